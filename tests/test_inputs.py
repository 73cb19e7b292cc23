"""Which clean test image belongs to which poisoned one, and in which order the clean subset comes."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from colours import CLASSES, NAME
from command import Edit
from conftest import RECORD
from fmp_core.data.attack_record import read_attack_record
from fmp_core.errors import UserError
from fmp_core.inputs import Inputs, load_inputs, paired_images, preprocessing, record_folder
from fmp_core.models.evaluate import TestData as Data
from fmp_core.settings import Settings


def data(counterparts: list[int] | None, originals: list[int]) -> Data:
    """Four clean images, of which image ``i`` is all ``i`` and of class ``i``, and poisoned ones that are all 100 + row."""
    count = len(originals)
    clean = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 1, 2, 2)
    poisoned = (100 + torch.arange(count, dtype=torch.uint8))[:, None, None, None].expand(count, 1, 2, 2)
    rows = None if counterparts is None else torch.tensor(counterparts)
    return Data(clean, torch.arange(4), poisoned, torch.zeros(count, dtype=torch.int64), torch.tensor(originals), rows)


def test_pairs_are_of_the_same_image_and_labels() -> None:
    clean, poisoned, labels = paired_images(data([3, -1, 1, 2], [3, 0, 1, 0]), 9)  # the last one is labelled otherwise
    assert clean[:, 0, 0, 0].tolist() == [3, 1] and poisoned[:, 0, 0, 0].tolist() == [100, 102] and labels.tolist() == [3, 1]


def test_fewer_pairs_are_spread_evenly() -> None:
    _, poisoned, _ = paired_images(data([1, 2, 3, 0, 1], [1, 2, 3, 0, 1]), 3)
    assert poisoned[:, 0, 0, 0].tolist() == [100, 102, 104]


@pytest.mark.parametrize(("counterparts", "says"), [(None, "does not say"), ([-1, 0], "--test_images")])
def test_without_pairs_there_is_a_sentence(counterparts: list[int] | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        paired_images(data(counterparts, [0, 1]), 9)


def test_an_index_file_in_order_of_classes_is_mixed_by_the_seed(workplace: Path) -> None:
    """FRG scores the first images, which should be of all classes; a file that mixes them itself is kept as it is."""

    def read(indices: list[int], seed: int = 0) -> Inputs:
        Path("index.txt").write_text("\n".join(map(str, indices)))
        return load_inputs(Settings(index="index.txt", random_seed=seed, epochs=0), RECORD, torch.device("cpu"))

    in_order = [image for label in range(10) for image in range(label, 50, 10)]
    one, again, other = (read(in_order, seed) for seed in (0, 0, 1))
    assert sorted(one.subset) == list(range(50)) and one.subset == again.subset != other.subset
    assert torch.equal(one.defender.labels, torch.tensor(one.subset) % 10)
    assert len(set(one.defender.labels[:10].tolist())) > 3
    mixed = read(list(range(50)))
    assert mixed.subset == list(range(50))
    assert torch.equal(one.defender.images, mixed.defender.images[one.subset])


def test_mean_and_std_reach_images_that_are_held_as_numbers(workplace: Path, edit_record: Edit) -> None:
    home = workplace / "record" / RECORD
    bad = read_attack_record(home).bd_test
    pixels = bad.pixels((32, 32, 3))

    def normalise(content: dict[str, Any]) -> None:
        x = (pixels.float() / 255 - 0.5) / 0.25
        content["bd_test"] = {"x": x, "y": bad.targets, "original_targets": bad.original}

    edit_record(home, normalise)
    inputs = load_inputs(Settings(mean=(0.5,), std=(0.25,), epochs=0), RECORD, torch.device("cpu"))
    assert torch.equal(inputs.test.poisoned_images, pixels)
    with pytest.raises(UserError, match="--mean and --std name others"):
        load_inputs(Settings(epochs=0), RECORD, torch.device("cpu"))


def test_mean_and_std_have_one_number_or_one_for_each_channel() -> None:
    grey: Any = SimpleNamespace(dataset="toys", image_size=(8, 8, 1))
    with pytest.raises(UserError, match=r"--std has 3 numbers, but the record's images have 1 channel"):
        preprocessing(grey, (0.5,), (0.1, 0.2, 0.3))
    assert preprocessing(grey, (0.5,), (0.2,)).std == (0.2,)


def test_a_class_folder_that_is_missing_is_noticed_without_triggered_images(colours: Path) -> None:
    """All labels after it would be others."""
    settings = Settings(record_root=str(colours / "record"), dataset_path=str(colours / "data"), epochs=0)
    assert load_inputs(settings, NAME, torch.device("cpu"))
    for split in ("train", "test"):
        shutil.rmtree(colours / "data" / "colours" / split / "class0")
    path = colours / "record" / NAME / "attack_result.pt"
    torch.save({**torch.load(path, weights_only=False), "bd_test": None}, path)
    with pytest.raises(UserError, match=f"has folders of {CLASSES - 1} classes, but the record's model has {CLASSES}"):
        load_inputs(settings, NAME, torch.device("cpu"))
    (colours / "data" / "colours").rename(colours / "data" / "gtsrb")
    for part in ("train", "test"):
        for number, folder in enumerate(sorted((colours / "data" / "gtsrb" / part).iterdir())):
            folder.rename(folder.with_name(f"{number:05d}"))  # numbers are labels, whichever are missing
    torch.save({**torch.load(path, weights_only=False), "clean_data": "gtsrb"}, path)
    assert load_inputs(settings, NAME, torch.device("cpu")).test.clean_labels.max() == CLASSES - 2


def test_a_record_has_a_name_wherever_the_command_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "badnet" / "inner").mkdir(parents=True)
    for place, root, given in (("badnet/inner", ".", ".."), ("badnet", ".", "."), (".", ".", "badnet"), (".", "badnet", ".")):
        monkeypatch.chdir(tmp_path / place)
        folder = record_folder(root, given)
        assert folder.name == "badnet" and folder.samefile(tmp_path / "badnet")
