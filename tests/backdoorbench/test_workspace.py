"""What BackdoorBench would misread is refused before it starts, and a record that has changed is not taken for the old one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import RECORD
from fmp_core.backdoorbench.final_test import write_final_test
from fmp_core.backdoorbench.workspace import _refuse_layout, open_job, workspace
from fmp_core.errors import UserError


def test_a_temporary_folder_that_backdoorbench_misreads_is_refused(
    checkout: Path, tiny_record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the dataset from beside the first 'record' of the path."""
    (tmp_path / "my records").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "my records"))
    with (
        pytest.raises(UserError, match="misreads paths with 'record' in them"),
        workspace(open_job(checkout, "record", RECORD, "data", "cpu")),
    ):
        pass
    assert not list((tmp_path / "my records").iterdir())


def test_unsorted_validation_images_are_refused(tmp_path: Path) -> None:
    """BackdoorBench would take them for one class."""
    for part in ("train/n01", "val/n01"):
        (tmp_path / "tiny-imagenet-200" / part).mkdir(parents=True)
    _refuse_layout("tiny", tmp_path)
    (tmp_path / "tiny-imagenet-200" / "val" / "images").mkdir()
    with pytest.raises(UserError, match=r"reads the validation images of tiny as val/<class>/\*"):
        _refuse_layout("tiny", tmp_path)


def test_a_record_that_was_made_again_meanwhile_is_not_tested_on(checkout: Path, tiny_record: Path) -> None:
    job, results = open_job(checkout, "record", RECORD, "data", "cpu"), tiny_record / "defense" / "echo"
    results.mkdir(parents=True)
    weights = torch.load(tiny_record / "attack_result.pt", weights_only=False)["model"]
    torch.save({"model": weights}, results / "defense_result.pt")
    with pytest.raises(UserError, match="was made again while the defense ran"):
        write_final_test(dataclasses.replace(job, digest="0" * 64), results)
    assert [path.name for path in results.iterdir()] == ["defense_result.pt"]


@pytest.mark.parametrize(
    ("device", "visible", "there", "seen"),
    [
        ("cpu", None, "cpu", ""),
        ("cuda", None, "cuda", None),
        ("cuda:1", None, "cuda:0", "1"),
        ("cuda:2,0", None, "cuda:0,1", "2,0"),
        ("cuda:1", "5,7,9", "cuda:0", "7"),
        ("auto", None, "cuda:0", None),
    ],
)
def test_backdoorbench_sees_the_gpus_that_are_named(
    device: str,
    visible: str | None,
    there: str,
    seen: str | None,
    checkout: Path,
    tiny_record: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some of its scripts use the first GPU whatever --device says."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("fmp_core.system.devices.fault_of_gpu", lambda _index: "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    job = open_job(checkout, "record", RECORD, "data", device)
    assert (job.flags[-2:], job.gpus) == (["--device", there], seen)
