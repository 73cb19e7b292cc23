"""Attack records: whatever BackdoorBench writes is read."""

from __future__ import annotations

import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fmp_core.data.attack_record import ATTACK_KEYS, find_records, read_attack_record
from fmp_core.data.images import Split
from fmp_core.data.write_record import AttackedModel, PoisonedImages, write_attack_record, write_defense_result
from fmp_core.errors import UserError
from fmp_core.models.build import load_model
from PIL import Image
from small_record import AT, PIXELS, SIZE, STATE, TRUE, Edit, clean_test, images_in, in_memory, rename_globals, set_to


def test_a_record_comes_back(record: Path):
    found = read_attack_record(record)
    assert (found.folder, found.model_name, found.num_classes, found.dataset) == (record, "resnet18", 4, "toys")
    assert found.image_size == SIZE
    assert list(found.state) == ["b", "a", "n"]
    assert all(torch.equal(found.state[key], value) and found.state[key].dtype == value.dtype for key, value in STATE.items())
    assert torch.equal(found.bd_test.pixels(SIZE), PIXELS)
    assert found.bd_test.targets.tolist() == [0] * 4
    assert found.bd_test.true_labels(clean_test()).tolist() == TRUE
    assert len(found.bd_test) == 4


def test_a_record_has_backdoorbenchs_shape(record: Path):
    content = torch.load(record / "attack_result.pt", weights_only=False)
    assert tuple(content) == ATTACK_KEYS
    assert content["data_path"] == "./data/toys" and content["img_size"] == SIZE
    train, test = content["bd_train"], content["bd_test"]
    for state, name, total in ((train, "bd_train_dataset", 20), (test, "bd_test_dataset", 8)):
        assert set(state) == {
            "bd_data_container", "getitem_all", "getitem_all_switch", "original_index_array", "poison_indicator",
            "save_folder_path",
        }  # fmt: skip
        assert set(state["bd_data_container"]) == {"save_folder_path", "data_dict", "save_file_format"}
        assert state["save_folder_path"] == f"./record/mine/{name}"
        assert state["poison_indicator"].shape == (total,) and state["poison_indicator"].dtype == np.float64
        assert (state["getitem_all"], state["getitem_all_switch"]) == (True, False)
    assert train["original_index_array"].tolist() == list(range(20))
    assert test["original_index_array"].tolist() == AT
    item = test["bd_data_container"]["data_dict"][4]
    assert item == {"path": "./record/mine/bd_test_dataset/2/4.png", "other_info": [0, 2]}


def test_a_defense_result_has_three_keys(tmp_path: Path):
    write_defense_result(tmp_path / "r.pt", "resnet18", 4, STATE)
    content = torch.load(tmp_path / "r.pt", weights_only=True)
    assert list(content) == ["model_name", "num_classes", "model"]
    assert list(content["model"]) == list(STATE) and content["model"]["a"].dtype == torch.float16


@pytest.mark.parametrize("wrong", [{"indices": [7, 7]}, {"indices": [0, 10]}, {"images": torch.zeros(3, 3, 4, 4).byte()}])
def test_images_that_fit_no_indices_are_not_written(wrong: dict[str, Any], tmp_path: Path):
    """Of two images at one index the second would replace the first."""
    images = torch.zeros(2, 3, 4, 4).byte()
    poisoned = PoisonedImages(10, **{"indices": [0, 1], "images": images, "targets": [0, 0], "original": [1, 2], **wrong})
    model = AttackedModel("resnet18", 3, {})
    with pytest.raises(UserError, match="bd_test_dataset do not fit: "):
        write_attack_record(tmp_path, name="r", model=model, dataset="cifar10", bd_train=None, bd_test=poisoned)
    assert not list(tmp_path.iterdir())


def test_records_are_found_by_name(record: Path):
    (record.parent / "empty").mkdir()
    shutil.copytree(record, record.parent / "another")
    assert find_records(record.parent) == ["another", "mine"]
    assert find_records(record.parent / "nowhere") == []


def test_nested_and_linked_records_are_found_once(record: Path, tmp_path: Path):
    shutil.copytree(record, record.parent / "cifar10" / "seed 1" / "nested")
    shutil.copytree(record, tmp_path / "elsewhere")
    (record.parent / "linked").symlink_to(tmp_path / "elsewhere")
    (record.parent / "cifar10" / "loop").symlink_to(record.parent)
    (record / "inner").mkdir()
    shutil.copy(record / "attack_result.pt", record / "inner")  # a record holds no records
    assert find_records(record.parent) == ["cifar10/seed 1/nested", "linked", "mine"]


def test_training_images_are_not_needed(record: Path, edit_record: Edit):
    edit_record(record, set_to("bd_train", value=None))
    shutil.rmtree(record / "bd_train_dataset")
    assert len(images_in(record)) == 4


def test_data_parallel_prefixes_are_dropped(record: Path, edit_record: Edit):
    edit_record(record, set_to("model", value=OrderedDict((f"module.{key}", value) for key, value in STATE.items())))
    assert list(read_attack_record(record).state) == ["b", "a", "n"]


@pytest.mark.parametrize(
    "wrapped", ["_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "{}.module.w", "a.{}._orig_mod.b"]
)
def test_what_wraps_modules_leaves_the_keys(wrapped: str, record: Path, edit_record: Edit):
    state = OrderedDict((wrapped.format(key), value) for key, value in STATE.items())
    state._metadata = OrderedDict([(wrapped.format("b"), {"version": 2})])  # type: ignore[attr-defined]
    edit_record(record, set_to("model", value=state))
    plain = wrapped.replace("module.", "").replace("_orig_mod.", "")
    found = read_attack_record(record).state
    assert list(found) == [plain.format(key) for key in STATE]
    assert found._metadata == {plain.format("b"): {"version": 2}}  # type: ignore[attr-defined]


def test_two_weights_of_one_name_are_refused(record: Path, edit_record: Edit):
    edit_record(record, set_to("model", value={"w": torch.ones(1), "module.w": torch.ones(1)}))
    with pytest.raises(UserError, match="two weights that are called w"):
        read_attack_record(record)


def with_numpy_keys(content: dict[str, Any]) -> None:
    container = content["bd_test"]["bd_data_container"]
    container["data_dict"] = {np.int64(key): value for key, value in container["data_dict"].items()}


def test_numpy_keys_are_read(record: Path, edit_record: Edit):
    edit_record(record, with_numpy_keys)
    assert torch.equal(images_in(record), PIXELS)


@pytest.mark.parametrize("old, new", [(b"numpy._core", b"numpy.core"), (b"numpy.core", b"numpy._core")])
def test_pickles_of_numpy_1_and_numpy_2_are_read(old: bytes, new: bytes, record: Path, edit_record: Edit):
    edit_record(record, with_numpy_keys)
    with zipfile.ZipFile(record / "attack_result.pt") as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    if old + b".multiarray\n" in pickled:
        rename_globals(record / "attack_result.pt", old + b".multiarray\n", new + b".multiarray\n")
    found = read_attack_record(record).bd_test
    assert found.indices is not None and found.indices.tolist() == AT


def test_images_in_memory_are_read(record: Path, edit_record: Edit):
    edit_record(record, in_memory)
    shutil.rmtree(record / "bd_test_dataset")
    found = read_attack_record(record).bd_test
    assert torch.equal(found.pixels(SIZE), PIXELS)
    assert found.targets.tolist() == [0] * 4 and found.true_labels(clean_test()).tolist() == TRUE


def test_images_in_memory_are_resized_to_the_records_size(record: Path, edit_record: Edit):
    def with_one_large(content: dict[str, Any]) -> None:
        in_memory(content)
        content["bd_test"]["bd_data_container"]["data_dict"][4] = (Image.new("RGB", (9, 7), (10, 20, 30)), 0, 2)

    edit_record(record, with_one_large)
    assert images_in(record)[1, :, 0, 0].tolist() == [10, 20, 30]


def test_clean_positions_are_left_out(record: Path, edit_record: Edit):
    def keep_two(content: dict[str, Any]) -> None:
        content["bd_test"]["poison_indicator"][[1, 6]] = 0

    edit_record(record, keep_two)
    found = read_attack_record(record).bd_test
    assert found.true_labels(clean_test()).tolist() == [2, 1]
    assert torch.equal(found.pixels(SIZE), PIXELS[[1, 3]])


def test_images_come_in_the_order_of_the_index_array(record: Path, edit_record: Edit):
    edit_record(record, set_to("bd_test", "original_index_array", value=np.array(AT[::-1])))
    assert torch.equal(images_in(record), PIXELS.flip(0))


def test_a_record_moved_and_renamed_is_read(record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    new = tmp_path / "elsewhere" / "renamed"
    new.parent.mkdir()
    record.rename(new)
    monkeypatch.chdir(new)
    assert torch.equal(images_in(new), PIXELS)
    assert torch.equal(images_in(Path(".")), PIXELS)


def test_a_record_behind_a_symlink_is_read(record: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(record)
    assert torch.equal(images_in(tmp_path / "link"), PIXELS)


@pytest.mark.parametrize("root", ["/data/bb/record/mine", "C:\\bb\\record\\mine", "record/mine"])
def test_paths_of_any_machine_are_resolved_in_the_folder(root: str, record: Path, edit_record: Edit):
    separator = "\\" if "\\" in root else "/"

    def change(content: dict[str, Any]) -> None:
        container = content["bd_test"]["bd_data_container"]
        container["save_folder_path"] = separator.join([root, "bd_test_dataset"])
        for index, true in zip(AT, TRUE, strict=True):
            parts = [root, "bd_test_dataset", str(true), f"{index}.png"]
            container["data_dict"][index]["path"] = separator.join(parts)

    edit_record(record, change)
    assert torch.equal(images_in(record), PIXELS)


def test_paths_without_their_image_folder_are_resolved_by_their_last_parts(record: Path, edit_record: Edit):
    edit_record(record, set_to("bd_test", "bd_data_container", "save_folder_path", value=None))
    assert torch.equal(images_in(record), PIXELS)


REAL = Path(__file__).resolve().parents[3] / "shared" / "records" / "badnet_cifar10.tar.xz"


@pytest.mark.shared
@pytest.mark.skipif(not REAL.is_file(), reason="../shared/records is absent")
def test_a_real_record_loads(tmp_path: Path):
    import tarfile

    from fmp_core.storage.torch_file import load_torch_file

    with tarfile.open(REAL) as archive:
        member = next(entry for entry in archive if entry.name.endswith("badnet_cifar10/attack_result.pt"))
        source = archive.extractfile(member)
        assert source is not None
        with open(tmp_path / "attack_result.pt", "wb") as target:
            shutil.copyfileobj(source, target)
    content = load_torch_file(tmp_path / "attack_result.pt")
    assert (content["model_name"], content["num_classes"], content["clean_data"]) == ("preactresnet18", 10, "cifar10")
    items = content["bd_test"]["bd_data_container"]["data_dict"]
    assert len(items) == 9000
    with pytest.raises(UserError, match="9000 of 9000 poisoned test images are missing"):
        read_attack_record(tmp_path)
    folder = content["bd_test"]["bd_data_container"]["save_folder_path"]
    for value in items.values():  # empty files are enough to be located
        file = tmp_path / Path(folder).name / Path(value["path"]).relative_to(folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    found = read_attack_record(tmp_path)
    assert len(found.bd_test) == 9000 and set(found.bd_test.targets.tolist()) == {0}
    load_model(found.model_name, found.num_classes, found.state)


def test_a_test_set_of_another_length_is_refused(record: Path):
    """One file too many, and every position after it names another image."""
    longer = Split(torch.cat([clean_test().labels, torch.tensor([0])]), lambda rows: torch.zeros(len(rows), 3, 8, 8))
    with pytest.raises(UserError, match=r"was made of 8 clean test images, but the test set has 9"):
        read_attack_record(record).bd_test.true_labels(longer)
