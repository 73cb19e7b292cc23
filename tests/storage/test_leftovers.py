"""Temporary files: those of killed processes go, all others are somebody's work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fmp_core.storage.files import HOST, write_text


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_only_leftovers_of_the_same_file_and_of_ended_processes_of_this_machine_go(tmp_path: Path) -> None:
    ended, alive = ended_process(), os.getpid()
    kept = {
        f".a.{HOST}-{alive}.ab12.csv",  # another thread or process writes it now
        f".a.another_host-{ended}.ab12.csv",
        f".b.{HOST}-{ended}.ab12.csv",
        f".a.{HOST}-{ended}.ab12.pt",
        f".a.b.{HOST}-{ended}.ab12.csv",
        f"a.{HOST}-{ended}.ab12.csv",
    }
    for name in (*kept, f".a.{HOST}-{ended}.ab12.csv"):
        (tmp_path / name).touch()
    write_text(tmp_path / "a.csv", "text")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "a.csv"}


def test_the_name_of_a_file_may_be_no_unicode(tmp_path: Path) -> None:
    write_text(tmp_path / "names.txt", os.fsdecode(b"caf\xe9.png") + " é\n")
    assert (tmp_path / "names.txt").read_text(encoding="utf-8") == "caf\\udce9.png é\n"


def test_files_of_another_users_process_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(process: int, signal: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    theirs = tmp_path / f".a.{HOST}-{ended_process()}.ab12.csv"
    theirs.touch()
    monkeypatch.setattr(os, "kill", refuse)
    write_text(tmp_path / "a.csv", "text")
    assert theirs.exists()
