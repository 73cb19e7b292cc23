"""Attack records: whatever BackdoorBench writes is read, and nothing that is wrong with one goes unsaid."""

from __future__ import annotations

import argparse
import os
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fmp_core.data.attack_record import ATTACK_KEYS, PoisonedSet, find_records, read_attack_record
from fmp_core.data.datasets import FACTS, Split
from fmp_core.data.write_record import PoisonedImages, write_attack_record, write_defense_result
from fmp_core.errors import UserError
from fmp_core.models.build import load_model
from PIL import Image

SIZE = (4, 4, 3)
TRUE = [1, 2, 3, 1]  # of the poisoned test images
AT = [1, 4, 6, 7]  # their positions in a clean test set of 8
STATE = OrderedDict(b=torch.arange(3.0), a=torch.ones(2, dtype=torch.float16), n=torch.tensor(5))
PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 4, 4), dtype=np.uint8))


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """A record of four triggered 4x4 images at positions AT, attack label 0; its weights belong to no model."""
    folder = tmp_path / "record" / "mine"
    test = PoisonedImages(8, AT, PIXELS, [0] * 4, TRUE)
    train = PoisonedImages(20, [3, 5], PIXELS[:2], [0, 0], [2, 3])
    write_attack_record(
        folder, name="mine", model_name="resnet18", num_classes=4, state=STATE, dataset="toys",
        bd_train=train, bd_test=test,
    )  # fmt: skip
    return folder


Edit = Callable[[Path, Callable[[dict[str, Any]], Any]], None]


def images_in(folder: Path) -> torch.Tensor:
    return read_attack_record(folder).bd_test.pixels(SIZE)


def set_to(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of a nested dict: ``set_to("bd_test", "x", value=1)``."""

    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def rename_globals(path: Path, old: bytes, new: bytes) -> None:
    """Rewrite the pickle of a torch file; global names are newline-terminated text in it, so lengths may change."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    names = [name for name in parts if name.endswith("/data.pkl")]
    assert len(names) == 1 and old in parts[names[0]]
    parts[names[0]] = parts[names[0]].replace(old, new)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def clean_test() -> Split:
    return Split(torch.tensor([0, 1, 0, 0, 2, 0, 3, 1]), lambda indices: torch.zeros(len(indices), 3, 4, 4, dtype=torch.uint8))


# What is written comes back.


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


# What BackdoorBench writes.


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


def in_memory(content: dict[str, Any]) -> None:
    """What BB writes with ``save_folder_path`` None: ``(PIL image, attack label, true label)``."""
    state = content["bd_test"]
    container = state["bd_data_container"]
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in PIXELS]
    container["data_dict"] = {index: (image, 0, true) for index, image, true in zip(AT, images, TRUE, strict=True)}
    container["save_folder_path"] = state["save_folder_path"] = None


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


# Paths that leave the record.


@pytest.mark.parametrize(
    "text",
    [
        "./record/mine/bd_test_dataset/../../../secret.png",
        "../secret.png",
        "a/b/c/../../secret.png",
        "./record/mine/bd_test_dataset/..\\..\\..\\secret.png",
    ],
)
def test_a_path_that_climbs_out_is_refused(text: str, record: Path, edit_record: Edit):
    for folder in (record.parent, record.parent.parent):
        Image.new("RGB", (4, 4)).save(folder / "secret.png")
    edit_record(record, set_to("bd_test", "bd_data_container", "data_dict", 4, "path", value=text))
    with pytest.raises(UserError, match="names an image outside its folder") as caught:
        read_attack_record(record)
    assert text in str(caught.value)


def test_an_absolute_path_stays_in_the_record(record: Path, tmp_path: Path, edit_record: Edit):
    secret = tmp_path / "a" / "b" / "secret.png"
    secret.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(secret)
    edit_record(record, set_to("bd_test", "bd_data_container", "data_dict", 4, "path", value=str(secret)))
    with pytest.raises(UserError, match="1 of 4 poisoned test images are missing"):
        read_attack_record(record)


def test_a_symlink_out_of_the_record_is_refused(record: Path, tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    file = record / "bd_test_dataset" / "2" / "4.png"
    file.unlink()
    file.symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match="outside its folder"):
        read_attack_record(record)


def test_the_image_folder_may_lie_on_another_disk(record: Path, tmp_path: Path):
    """... behind a link; but nothing in it may lead elsewhere."""
    (record / "bd_test_dataset").rename(tmp_path / "images")
    (record / "bd_test_dataset").symlink_to(tmp_path / "images")
    assert torch.equal(images_in(record), PIXELS)
    (tmp_path / "images" / "2").rename(tmp_path / "two")
    (tmp_path / "images" / "2").symlink_to(tmp_path / "two")
    with pytest.raises(UserError, match="outside its folder"):
        read_attack_record(record)


def test_a_symlink_loop_is_refused(record: Path):
    file = record / "bd_test_dataset" / "2" / "4.png"
    file.unlink()
    file.symlink_to(file)
    with pytest.raises(UserError):
        read_attack_record(record)


def test_an_overlong_path_is_refused(record: Path, edit_record: Edit):
    edit_record(
        record, set_to("bd_test", "bd_data_container", "data_dict", 4, "path", value=f"bd_test_dataset/2/{'c' * 300}.png")
    )
    with pytest.raises(UserError):
        read_attack_record(record)


# Images that are missing or broken.


def test_missing_images_are_counted_and_the_first_named(record: Path):
    (record / "bd_test_dataset" / "3" / "6.png").unlink()
    (record / "bd_test_dataset" / "2" / "4.png").unlink()
    with pytest.raises(UserError, match=r"2 of 4 poisoned test images are missing, first .*2/4\.png; copy the whole record"):
        read_attack_record(record)


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_a_broken_image_is_named(content: bytes | None, record: Path):
    file = record / "bd_test_dataset" / "2" / "4.png"
    file.write_bytes(file.read_bytes()[:60] if content is None else content)
    with pytest.raises(UserError, match=r"2/4\.png cannot be decoded"):
        images_in(record)


# Version 1 of BackdoorBench.


def v1(x: Any, **more: Any) -> Callable[[dict[str, Any]], None]:
    return set_to("bd_test", value={"x": x, "y": [0] * 4, **more})


def pil_images() -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in PIXELS]


X = {
    "float tensor": lambda: PIXELS.float() / 255,
    "between grey levels": lambda: (PIXELS.float() - 0.3).clamp(min=0) / 255,
    "PIL images": pil_images,
    "arrays": lambda: [image.permute(1, 2, 0).numpy() for image in PIXELS],
}


@pytest.mark.parametrize("x", X.values(), ids=X.keys())
def test_v1_images_are_read(x: Callable[[], Any], record: Path, edit_record: Edit):
    edit_record(record, v1(x(), original_targets=TRUE))
    found = read_attack_record(record).bd_test
    assert torch.equal(found.pixels(SIZE), PIXELS)
    assert found.targets.tolist() == [0] * 4 and found.true_labels(clean_test()).tolist() == TRUE


def test_v1_labels_may_be_tensors_or_arrays(record: Path, edit_record: Edit):
    x = PIXELS.float() / 255
    edit_record(record, set_to("bd_test", value={"x": x, "y": torch.zeros(4), "original_targets": np.array(TRUE)}))
    found = read_attack_record(record).bd_test
    assert found.targets.dtype == torch.int64 and found.true_labels(clean_test()).tolist() == TRUE


def test_v1_true_labels_come_from_the_indices(record: Path, edit_record: Edit):
    edit_record(record, v1(pil_images(), original_index=np.array(AT)))
    assert read_attack_record(record).bd_test.true_labels(clean_test()).tolist() == TRUE


@pytest.mark.parametrize("key", [("model",), ("img_size",), ("bd_test", "poison_indicator")])
def test_an_unknown_object_where_data_is_needed_is_named(key: tuple[str, ...], record: Path, edit_record: Edit):
    edit_record(record, set_to(*key, value=argparse.Namespace(x=1)))
    with pytest.raises(UserError, match=rf"{' '.join(key)} is a argparse\.Namespace"):
        read_attack_record(record)


def test_a_test_set_in_another_order_is_refused(record: Path):
    """RA would still be right, but pairs of clean and poisoned images would show different things."""
    poisoned, test = read_attack_record(record).bd_test, clean_test()
    shuffled = Split(test.labels.flip(0), test.read)
    with pytest.raises(UserError, match="of its 4 poisoned test images, only 0 are those of the clean test images"):
        poisoned.true_labels(shuffled)


def test_a_few_labels_may_differ_from_the_clean_test_set(tmp_path: Path):
    labels = torch.arange(100) % 7
    poisoned = PoisonedSet(torch.zeros(100, 3, 1, 1), torch.zeros(100).long(), labels, torch.arange(100))
    other = labels.clone()
    other[:5] += 1
    assert torch.equal(poisoned.true_labels(Split(other, lambda rows: torch.zeros(0))), labels)
    other[5] += 1
    with pytest.raises(UserError, match="another order"):
        poisoned.true_labels(Split(other, lambda rows: torch.zeros(0)))


def test_a_dataset_may_have_a_blank_in_its_name(record: Path, edit_record: Edit):
    edit_record(record, set_to("clean_data", value="my toys"))
    assert read_attack_record(record).dataset == "my toys"


def test_v1_without_true_labels_is_refused(record: Path, edit_record: Edit):
    edit_record(record, v1(pil_images()))
    found = read_attack_record(record).bd_test
    with pytest.raises(UserError, match="RA is undefined"):
        found.true_labels(clean_test())


@pytest.mark.parametrize(
    "index",
    [8, 999, -1],
)
def test_a_v1_index_outside_the_test_set_is_refused(index: int, record: Path, edit_record: Edit):
    edit_record(record, v1(pil_images(), original_index=[1, 4, 6, index]))
    with pytest.raises(UserError):
        read_attack_record(record).bd_test.true_labels(clean_test())


@pytest.mark.parametrize(
    "more", [{"original_targets": TRUE[:3]}, {"original_index": AT[:3]}], ids=lambda more: next(iter(more))
)
def test_v1_true_labels_must_be_as_many_as_images(more: dict[str, Any], record: Path, edit_record: Edit):
    edit_record(record, v1(pil_images(), **more))
    with pytest.raises(UserError):
        read_attack_record(record).bd_test.true_labels(clean_test())


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, 3, 4, 4),
        torch.zeros(4, 3, 8, 8),
        torch.zeros(4, 1, 4, 4),
        torch.zeros(4),
        None,
        7,
        [],
    ],
    ids=["three", "large", "grey", "flat", "none", "number", "empty"],
)
def test_v1_images_that_do_not_fit_are_refused(x: Any, record: Path, edit_record: Edit):
    edit_record(record, v1(x, original_targets=TRUE))
    with pytest.raises(UserError, match="not as BackdoorBench writes it"):
        read_attack_record(record)


def test_v1_floats_in_the_unit_interval_are_pixels(record: Path, edit_record: Edit):
    edit_record(record, v1([np.full((4, 4, 3), 0.2, np.float32)] * 4, original_targets=TRUE))
    assert read_attack_record(record).bd_test.pixels((4, 4, 3)).unique().tolist() == [51]


def normalised(pixels: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    return (pixels.float() / 255 - mean) / std


MNIST_PIXELS = PIXELS[:, :1]
RANGES: dict[str, Callable[[], Any]] = {
    "bytes, channels first": lambda: PIXELS,
    "bytes, channels last": lambda: PIXELS.permute(0, 2, 3, 1),
    "whole floats": lambda: PIXELS.float(),
    "floats of bytes, channels last": lambda: PIXELS.permute(0, 2, 3, 1).numpy().astype(np.float64),
    "long integers": lambda: PIXELS.long(),
    "a list of tensors": lambda: list(PIXELS),
    "a list of float tensors": lambda: [image / 255 for image in PIXELS],
    "a list of tensors, channels last": lambda: [image.permute(1, 2, 0) for image in PIXELS],
    "a list of arrays, channels first": lambda: [image.numpy() for image in PIXELS],
}


@pytest.mark.parametrize("x", RANGES.values(), ids=RANGES.keys())
def test_the_range_and_layout_of_v1_images_are_found(x: Callable[[], Any], record: Path, edit_record: Edit):
    edit_record(record, v1(x(), original_targets=TRUE))
    assert torch.equal(images_in(record), PIXELS)


def test_normalised_v1_images_are_recognised_by_the_datasets_mean_and_std(record: Path, edit_record: Edit):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (FACTS["cifar10"].mean, FACTS["cifar10"].std))
    edit_record(record, v1((PIXELS.float() / 255 - mean) / std, original_targets=TRUE))
    edit_record(record, set_to("clean_data", value="CIFAR-10"))
    assert torch.equal(images_in(record), PIXELS)


UNCERTAIN: dict[str, Callable[[], Any]] = {
    "normalised otherwise": lambda: normalised(PIXELS, 0.5, 0.5),
    "above one": lambda: PIXELS.float() / 100,
    "above 255": lambda: PIXELS.long() + 10,
    "below zero": lambda: PIXELS.long() - 1,
    "floats beside bytes": lambda: [PIXELS[0], *(PIXELS[1:].float() / 255)],
}


@pytest.mark.parametrize("x", UNCERTAIN.values(), ids=UNCERTAIN.keys())
def test_v1_images_of_an_uncertain_range_are_refused_and_never_clipped(x: Callable[[], Any], record: Path, edit_record: Edit):
    edit_record(record, v1(x(), original_targets=TRUE))
    with pytest.raises(UserError, match="bd_test x holds"):
        read_attack_record(record)


# Files that are no records.


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_record_is_called_truncated(share: float, record: Path):
    path = record / "attack_result.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"attack_result\.pt is not a whole torch file .*truncated"):
        read_attack_record(record)


class Attack:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("path", [("bd_train",), ("model", "w"), ("bd_test", "bd_data_container", "data_dict", 4, "path")])
def test_a_hostile_record_is_refused_and_nothing_in_it_runs(
    path: tuple[Any, ...], record: Path, tmp_path: Path, edit_record: Edit
):
    trace = tmp_path / "trace"
    edit_record(record, set_to(*path, value=Attack(f"touch {trace}")))
    torch.load(record / "attack_result.pt", weights_only=False)
    assert trace.exists(), "the attack itself must work, or this test proves nothing"
    trace.unlink()
    with pytest.raises(UserError) as caught:
        read_attack_record(record)
    assert not trace.exists()
    assert f"asks for {os.system.__module__}.system" in str(caught.value)


def test_a_missing_folder_and_a_folder_without_result_are_named(record: Path):
    with pytest.raises(UserError, match="gone does not exist; check --result_file"):
        read_attack_record(record.parent / "gone")
    (record / "attack_result.pt").unlink()
    with pytest.raises(UserError, match=r"holds no attack_result\.pt"):
        read_attack_record(record)


@pytest.mark.parametrize("content", [[1, 2], "text", None, torch.ones(3)], ids=["list", "text", "none", "tensor"])
def test_anything_but_a_dict_is_refused(content: Any, record: Path):
    torch.save(content, record / "attack_result.pt")
    with pytest.raises(UserError, match="is not an attack record"):
        read_attack_record(record)


@pytest.mark.parametrize("key", ATTACK_KEYS)
def test_a_missing_key_is_named(key: str, record: Path, edit_record: Edit):
    edit_record(record, lambda content: content.pop(key))
    with pytest.raises(UserError, match=f"it lacks {key}"):
        read_attack_record(record)


def test_a_defense_result_is_no_attack_record(record: Path):
    write_defense_result(record / "attack_result.pt", "resnet18", 4, STATE)
    with pytest.raises(UserError, match="it lacks data_path, img_size, clean_data, bd_train, bd_test"):
        read_attack_record(record)


WRONG: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "dataset climbs": (("clean_data",), "../secret", "names no dataset"),
    "dataset number": (("clean_data",), 10, "names no dataset"),
    "dataset empty": (("clean_data",), "", "names no dataset"),
    "model name": (("model_name",), None, "model_name is None"),
    "one class": (("num_classes",), 1, "num_classes is 1"),
    "classes text": (("num_classes",), "ten", "ten"),
    "classes none": (("num_classes",), None, "TypeError"),
    "size of two": (("img_size",), (32, 32), "ValueError"),
    "size zero": (("img_size",), (0, 4, 3), "img_size"),
    "size huge": (("img_size",), (10**6, 10**6, 3), "img_size"),
    "five channels": (("img_size",), (4, 4, 5), "img_size"),
    "size none": (("img_size",), None, "TypeError"),
    "model none": (("model",), None, "AttributeError"),
    "weights text": (("model", "b"), "abc", r"model\['b'\] is a str"),
    "no test": (("bd_test",), None, "bd_test is a NoneType"),
    "empty test": (("bd_test",), {}, "bd_data_container"),
    "no container": (("bd_test", "bd_data_container"), None, "TypeError"),
    "no items": (("bd_test", "bd_data_container", "data_dict"), {}, "no entry for poisoned image 1"),
    "item lacks labels": (("bd_test", "bd_data_container", "data_dict", 4), {"path": "a/b/c.png"}, "other_info"),
    "path none": (("bd_test", "bd_data_container", "data_dict", 4, "path"), None, "AttributeError"),
    "path with a zero byte": (("bd_test", "bd_data_container", "data_dict", 4, "path"), "a/b\0/c.png", "ValueError"),
    "attack label too large": (("bd_test", "bd_data_container", "data_dict", 4, "other_info"), [4, 2], "attack label"),
    "attack label negative": (("bd_test", "bd_data_container", "data_dict", 4, "other_info"), [-1, 2], "attack label"),
    "true label too large": (("bd_test", "bd_data_container", "data_dict", 4, "other_info"), [0, 4], "original label"),
    "index too large": (("bd_test", "original_index_array"), np.array([1, 8]), r"outside 0\.\.7"),
    "index negative": (("bd_test", "original_index_array"), np.array([-1, 4]), r"outside 0\.\.7"),
    "no index": (("bd_test", "original_index_array"), [], "no poisoned image"),
    "nothing poisoned": (("bd_test", "poison_indicator"), np.zeros(8), "no poisoned image"),
    "short indicator": (("bd_test", "poison_indicator"), np.ones(3), r"outside 0\.\.2"),
}


@pytest.mark.parametrize("path, value, says", WRONG.values(), ids=WRONG.keys())
def test_an_impossible_record_is_refused_with_the_reason(
    path: tuple[Any, ...], value: Any, says: str, record: Path, edit_record: Edit
):
    edit_record(record, set_to(*path, value=value))
    with pytest.raises(UserError, match=says) as caught:
        read_attack_record(record)
    assert str(record) in str(caught.value) and "\n" not in str(caught.value)


def test_a_tensor_for_bd_test_is_refused(record: Path, edit_record: Edit):
    edit_record(record, set_to("bd_test", value=torch.ones(3)))
    with pytest.raises(UserError):
        read_attack_record(record)


def test_a_pickled_image_without_content_is_refused(record: Path, edit_record: Edit):
    def change(content: dict[str, Any]) -> None:
        in_memory(content)
        image = Image.new("RGBA", (4, 4))
        content["bd_test"]["bd_data_container"]["data_dict"][4] = (image, 0, 2)

    edit_record(record, change)
    with pytest.raises(UserError, match="mode RGBA"):
        read_attack_record(record)


def test_classes_that_do_not_fit_the_weights_are_named(tiny_record: Path, edit_record: Edit):
    edit_record(tiny_record, set_to("num_classes", value=12))
    found = read_attack_record(tiny_record)
    with pytest.raises(UserError, match=r"weight has shape \(10, .*with 12 classes needs \(12, "):
        load_model(found.model_name, found.num_classes, found.state)


REAL = Path(__file__).resolve().parents[3] / "shared" / "records" / "badnet_cifar10.tar.xz"


@pytest.mark.shared
@pytest.mark.skipif(not REAL.is_file(), reason="../shared/records is absent")
def test_a_real_record_loads(tmp_path: Path):
    import tarfile

    from fmp_core.data.attack_record import _attack_record
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
        _attack_record(tmp_path, content)
    folder = content["bd_test"]["bd_data_container"]["save_folder_path"]
    for value in items.values():  # empty files are enough to be located
        file = tmp_path / Path(folder).name / Path(value["path"]).relative_to(folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    found = _attack_record(tmp_path, content)
    assert len(found.bd_test) == 9000 and set(found.bd_test.targets.tolist()) == {0}
    load_model(found.model_name, found.num_classes, found.state)
