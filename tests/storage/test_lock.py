"""One process at a time, and no link followed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fmp_core.errors import UserError
from fmp_core.storage.lock import locked

HOLDER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from fmp_core.storage.lock import locked
with locked(Path(sys.argv[2]), wait=False):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_or_waits_and_a_killed_one_lets_go(tmp_path: Path):
    folder = tmp_path / "results {x}"
    command = [sys.executable, "-c", HOLDER, str(Path(__file__).parents[2] / "defense"), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(UserError, match=r"Another run works in .*results {x}; wait"),
            locked(folder, wait=False),
        ):
            pass
        with pytest.raises(UserError, match="taken"), locked(folder, wait=False, busy="taken"):
            pass
        with locked(folder, wait=False, name="another.lock"):
            pass
        holder.kill()
        with locked(folder, wait=True), pytest.raises(UserError), locked(folder, wait=False):
            pass
    with locked(folder, wait=False):
        pass


@pytest.mark.parametrize("target", ["precious.txt", "nowhere"])
def test_a_link_in_its_place_is_refused(target: str, tmp_path: Path):
    (tmp_path / "precious.txt").write_text("precious")
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / ".lock").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=r"\.lock is a link"), locked(folder, wait=True):
        pass
    assert (tmp_path / "precious.txt").read_text() == "precious" and not (tmp_path / "nowhere").exists()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), locked(tmp_path / "file" / "results", wait=True):
        pass
