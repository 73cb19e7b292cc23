"""What BackdoorBench is given of a stranger's record: plain data and images of the record, nothing else."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fmp_core.backdoorbench.record_copy import write_result_copy
from fmp_core.backdoorbench.run import run_on_record
from fmp_core.backdoorbench.workspace import Job, open_job, workspace
from fmp_core.data.attack_record import read_attack_record
from fmp_core.errors import UserError
from fmp_core.storage.torch_file import load_torch_file
from PIL import Image

RECORD = "badnet_tiny"


def job(checkout: Path) -> Job:
    return open_job(checkout, "record", RECORD, "data", "cpu")


def test_the_copy_is_the_record_with_paths_inside_the_workspace(
    checkout: Path, tiny_record: Path, edit_record: Callable[..., None]
) -> None:
    """... wherever the stored paths lead: into Python's import path, say, or to another run's images."""
    for stored in ("yaml", "/somewhere/else/record/other/bd_test_dataset"):

        def lead_astray(content: dict[str, Any], stored: str = stored) -> None:
            container = content["bd_test"]["bd_data_container"]
            for item in container["data_dict"].values():
                item["path"] = f"{stored}/" + "/".join(item["path"].split("/")[-2:])
            container["save_folder_path"] = stored

        before = read_attack_record(tiny_record)
        if stored == "yaml":
            shutil.copytree(tiny_record / "bd_test_dataset", tiny_record / "yaml")
            (tiny_record / "yaml" / "__init__.py").write_text("raise SystemExit(3)")
        edit_record(tiny_record, lead_astray)
        with workspace(job(checkout)) as folder:
            assert not (folder / "yaml").exists()
            copied = torch.load(folder / "record" / RECORD / "attack_result.pt", weights_only=False)
            items = copied["bd_test"]["bd_data_container"]["data_dict"]
            assert all((folder / item["path"]).is_file() for item in items.values())
            assert [item["other_info"][0] for item in items.values()] == before.bd_test.targets.tolist()
            assert all(torch.equal(copied["model"][key], value) for key, value in before.state.items())
            assert (folder / "data" / "cifar10" / "cifar-10-batches-py").is_dir()


@pytest.mark.parametrize("held", [False, True])
def test_the_copy_says_what_the_record_says(
    held: bool, checkout: Path, tiny_record: Path, edit_record: Callable[..., None]
) -> None:
    """... whether it names image files or holds the images."""

    def hold(content: dict[str, Any]) -> None:
        items = content["bd_test"]["bd_data_container"]["data_dict"]
        for number, item in items.items():
            items[number] = (Image.new("RGB", (32, 32), (number, 0, 0)), *item["other_info"])

    if held:
        edit_record(tiny_record, hold)
    own = torch.load(tiny_record / "attack_result.pt", weights_only=False)
    with workspace(job(checkout)) as folder:
        copy = torch.load(folder / "record" / RECORD / "attack_result.pt", weights_only=False)
    facts = ("model_name", "num_classes", "img_size", "clean_data")
    assert [copy[name] for name in facts] == [own[name] for name in facts]
    for part in ("bd_train", "bd_test"):
        for name in ("original_index_array", "poison_indicator", "getitem_all", "getitem_all_switch"):
            np.testing.assert_array_equal(copy[part][name], own[part][name])
        given, held_here = (content[part]["bd_data_container"]["data_dict"] for content in (copy, own))
        assert list(given) == list(held_here)
        for one, other in zip(given.values(), held_here.values(), strict=True):
            if isinstance(other, dict):
                assert one["other_info"] == other["other_info"] and Path(one["path"]).name == Path(other["path"]).name
            else:
                assert one[1:] == other[1:] and np.array_equal(one[0], other[0])


def test_backdoorbench_is_given_images_and_what_we_wrote_only(checkout: Path, tiny_record: Path) -> None:
    (tiny_record / "clean_model.pth").write_bytes(b"a pickle")
    (tiny_record / "notes.csv").write_text("a,b")
    with workspace(job(checkout)) as folder:
        names = {path.name for path in (folder / "record" / RECORD).iterdir()}
    assert names == {"attack_result.pt", "bd_test_dataset", "bd_train_dataset", "defense"}


def test_an_analysis_reads_no_result_that_holds_more_than_data(checkout: Path, tiny_record: Path) -> None:
    result = tiny_record / "defense" / "echo" / "defense_result.pt"
    result.parent.mkdir(parents=True)
    torch.save({"model": {}, "extra": Image.new("RGB", (2, 2)).filter}, result)  # a method, by getattr
    with pytest.raises(UserError, match="was refused"):
        run_on_record(job(checkout), "echo", "names", "python", [])


class Writer:
    """Pickled as a call of a Pillow class that empties a file when it is made."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        from PIL.TiffImagePlugin import AppendingTiffWriter

        return AppendingTiffWriter, (self.path, True)


def test_no_class_of_pillow_but_an_image_is_left_to_another_program(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    torch.save({"model": {}, "x": Writer(str(tmp_path / "precious"))}, tmp_path / "writer.pt")
    assert load_torch_file(tmp_path / "writer.pt")["x"] is not None  # we make no such object
    with pytest.raises(UserError, match="AppendingTiffWriter"):
        write_result_copy(tmp_path / "writer.pt", tmp_path / "copy.pt")
    torch.save({"model": {"w": torch.ones(2)}, "y": np.arange(3)}, tmp_path / "result.pt")
    write_result_copy(tmp_path / "result.pt", tmp_path / "copy.pt")
    assert torch.load(tmp_path / "copy.pt", weights_only=False)["y"].tolist() == [0, 1, 2]
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("name", ["archive/data.pkl", "ARCHIVE/DATA.PKL"])
def test_a_file_that_two_readers_read_differently_is_refused(tmp_path: Path, name: str) -> None:
    torch.save({"a": 1}, tmp_path / "archive.pt")
    torch.save({"a": 2}, tmp_path / "other.pt")
    with zipfile.ZipFile(tmp_path / "other.pt") as other:
        (pickle,) = (other.read(part) for part in other.namelist() if part.endswith("data.pkl"))
    with zipfile.ZipFile(tmp_path / "archive.pt", "a") as archive, pytest.warns() if name.islower() else nullcontext():
        archive.writestr(name, pickle)
    with pytest.raises(UserError, match="same name"):
        load_torch_file(tmp_path / "archive.pt")


def test_what_backdoorbench_reads_otherwise_is_refused(
    checkout: Path, tiny_record: Path, edit_record: Callable[..., None]
) -> None:
    """... images of another size, a model it does not know, a dataset that lies otherwise, a record of v1."""
    data = Path("data/cifar10/cifar-10-batches-py")
    data.rename("data/cifar10/elsewhere")
    shutil.copytree("data/cifar10/elsewhere", "data/cifar10", dirs_exist_ok=True)
    with pytest.raises(UserError, match="reads cifar10 from cifar-10-batches-py, which"):
        job(checkout)
    Path("data/cifar10/elsewhere").rename(data)
    code = checkout / "utils" / "aggregate_block" / "model_trainer_generate.py"
    code.write_text("if model_name == 'a_forks_own':")
    with pytest.raises(UserError, match="and BackdoorBench knows a_forks_own"):
        job(checkout)
    code.unlink()
    edit_record(tiny_record, lambda content: content.update(img_size=(64, 64, 3)))
    with pytest.raises(UserError, match="its images are 64x64, and BackdoorBench's defenses take all of cifar10 as 32x32"):
        job(checkout)
    old = {"x": torch.zeros(2, 3, 32, 32), "y": [0, 0], "original_targets": [1, 2], "original_index": [1, 2]}
    edit_record(tiny_record, lambda content: content.update(img_size=(32, 32, 3), bd_test=old))
    with pytest.raises(UserError, match="is of BackdoorBench v1"), workspace(job(checkout)):
        pass


def test_test_images_of_a_forks_own_dataset_are_refused(
    checkout: Path, tiny_record: Path, edit_record: Callable[..., None]
) -> None:
    shutil.copytree("data/cifar10", "data/a_forks_own")
    for split in ("train", "test"):
        for label in range(10):
            folder = Path("data/a_forks_own") / split / str(label)
            folder.mkdir(parents=True)
            for number in range(5 if split == "train" else 1):
                Image.new("RGB", (32, 32)).save(folder / f"{number}.png")
    edit_record(tiny_record, lambda content: content.update(clean_data="a_forks_own"))
    with pytest.raises(UserError, match="whose preprocessing only BackdoorBench knows"):
        run_on_record(job(checkout), "echo", None, "python", [], test_images=5)
