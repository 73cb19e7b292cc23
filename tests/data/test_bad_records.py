"""Files that are no records, and records that cannot be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fmp_core.data.attack_record import READ_KEYS, read_attack_record
from fmp_core.data.write_record import write_defense_result
from fmp_core.errors import UserError
from fmp_core.models.build import load_model
from PIL import Image
from small_record import STATE, Edit, in_memory, set_to


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


def test_a_model_file_in_place_of_a_record_is_called_so(record: Path):
    torch.save(STATE, record.parent / "model.pth")
    with pytest.raises(UserError, match=r"model\.pth is a file, but a record is a folder; docs/records\.md says how"):
        read_attack_record(record.parent / "model.pth")
    torch.save(STATE, record / "attack_result.pt")
    with pytest.raises(UserError, match=r"holds weights alone; docs/records\.md says how .* it lacks model_name"):
        read_attack_record(record)


def test_what_only_backdoorbench_reads_may_be_missing(record: Path, edit_record: Edit):
    edit_record(record, lambda content: [content.pop(key) for key in ("bd_train", "data_path")])
    assert len(read_attack_record(record).bd_test)


@pytest.mark.parametrize("key", READ_KEYS)
def test_a_missing_key_is_named(key: str, record: Path, edit_record: Edit):
    edit_record(record, lambda content: content.pop(key))
    with pytest.raises(UserError, match=f"it lacks {key}"):
        read_attack_record(record)


def test_a_defense_result_is_no_attack_record(record: Path):
    write_defense_result(record / "attack_result.pt", "resnet18", 4, STATE)
    with pytest.raises(UserError, match="it lacks img_size, clean_data, bd_test"):
        read_attack_record(record)


WRONG: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "dataset climbs": (("clean_data",), "../secret", "names no dataset"),
    "dataset number": (("clean_data",), 10, "names no dataset"),
    "dataset empty": (("clean_data",), "", "names no dataset"),
    "model name": (("model_name",), None, "model_name is None"),
    "one class": (("num_classes",), 1, "num_classes is 1"),
    "an image twice": (("bd_test", "original_index_array"), np.array([1, 1, 4]), "names an image twice"),
    "classes text": (("num_classes",), "ten", "ten"),
    "classes none": (("num_classes",), None, "TypeError"),
    "size of two": (("img_size",), (32, 32), "ValueError"),
    "size with a part": (("img_size",), (4.5, 4, 3), "where a size, a class or an index belongs"),
    "classes with a part": (("num_classes",), 4.5, "where a size, a class or an index belongs"),
    "size zero": (("img_size",), (0, 4, 3), "img_size"),
    "size huge": (("img_size",), (10**6, 10**6, 3), "img_size"),
    "five channels": (("img_size",), (4, 4, 5), "img_size"),
    "size none": (("img_size",), None, "TypeError"),
    "model none": (("model",), None, "AttributeError"),
    "weights text": (("model", "b"), "abc", r"model\['b'\] is a str"),
    "no test": (("bd_test",), 3, "bd_test is a int"),
    "empty test": (("bd_test",), {}, "bd_data_container"),
    "no container": (("bd_test", "bd_data_container"), None, "TypeError"),
    "no items": (("bd_test", "bd_data_container", "data_dict"), {}, "no entry for poisoned image 1"),
    "item lacks labels": (("bd_test", "bd_data_container", "data_dict", 4), {"path": "a/b/c.png"}, "other_info"),
    "path none": (("bd_test", "bd_data_container", "data_dict", 4, "path"), None, "an image path of bd_test is None"),
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
