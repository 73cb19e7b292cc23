"""Files appear whole or not at all."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from fmp_core.storage import files
from fmp_core.storage.files import replacing, write_text, write_torch


def test_a_file_is_replaced(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    write_text(path, "new é")
    assert path.read_text(encoding="utf-8") == "new é"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.skipif(os.name != "posix", reason="only there can folders be synced")
def test_a_file_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its content is on the disk before it has its name, and the name before the call returns."""
    path, done, sync, replace = tmp_path / "a.txt", [], os.fsync, os.replace

    def note(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        sync(handle)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("named"), replace(old, new)))
    write_text(path, "text")
    assert done == ["file", "named", "folder"] and path.read_text() == "text"


def test_missing_folders_are_made(tmp_path: Path):
    write_text(tmp_path / "x" / "y" / "a.txt", "text")
    assert (tmp_path / "x" / "y" / "a.txt").read_text() == "text"


def test_a_relative_path_is_not_taken_for_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As pandas would."""
    monkeypatch.chdir(tmp_path)
    with replacing("~/table.csv") as temporary:
        pd.DataFrame({"a": [1]}).to_csv(temporary)
    assert (tmp_path / "~" / "table.csv").is_file()


def test_until_the_end_the_old_content_stands(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path and temporary.suffix == ".csv"
    assert path.read_text() == "half"


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_content_and_nothing_else(kind: type[BaseException], tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(kind), replacing(path) as temporary:
        temporary.write_text("half")
        raise kind
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_exception_leaves_no_new_file(tmp_path: Path):
    with pytest.raises(AttributeError):
        write_torch(tmp_path / "a.pt", {"tensor": torch.ones(3), "unpicklable": lambda: None})
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_any_new_file(umask: int, mode: int, tmp_path: Path):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "text")
        assert os.umask(umask) == umask  # and the process keeps its umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode


def test_tensors_come_back(tmp_path: Path):
    write_torch(tmp_path / "a.pt", {"x": torch.arange(5)})
    assert torch.load(tmp_path / "a.pt", weights_only=True)["x"].tolist() == [0, 1, 2, 3, 4]


def test_ctrl_c_while_tensors_are_written_is_no_error_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Torch's writer meets the interrupt in its middle, and says something about positions instead."""

    class Interrupted(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 1000:
                raise KeyboardInterrupt
            return super().write(data)

    monkeypatch.setattr(files, "open", Interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        write_torch(tmp_path / "a.pt", {"weights": torch.zeros(100_000)})
    assert list(tmp_path.iterdir()) == []
