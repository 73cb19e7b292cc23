"""Disks that are full or must not be written: one sentence, and earlier results stand."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import SHORT
from conftest import RECORD, call_fmp


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 12 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("only root may mount")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, leave: int) -> None:
    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(bytes(max(0, free - leave)))


def test_a_full_disk_is_one_sentence_and_earlier_results_stand(
    workplace: Path, real_workplace_template: Path, small_disk: Path
):
    """The weights of a model of BackdoorBench's do not fit any more; the smaller files before them do."""
    shutil.copytree(real_workplace_template / "record", small_disk / "record")
    flags = [*SHORT, "--record_root", str(small_disk / "record")]
    assert call_fmp(*flags).code == 0
    results = small_disk / "record" / RECORD / "defense" / "fmp"
    earlier = {path.name: path.read_bytes() for path in results.iterdir() if path.is_file()}
    fill(small_disk, leave=300_000)  # the weights take 2.8 MB
    ran = call_fmp(*flags, "--p", "32")
    last = ran.err.splitlines()[-1]
    assert ran.code == 2 and "Traceback" not in ran.err
    assert last.startswith("fmp: ") and "defense_result.pt cannot be written (No space left on device)" in last
    assert not list(results.rglob(".*.pt"))
    assert (results / "defense_result.pt").read_bytes() == earlier["defense_result.pt"]
    assert (results / "metrics.json").read_bytes() == earlier["metrics.json"]
    (small_disk / "ballast").unlink()
    assert call_fmp(*flags, "--p", "32").code == 0
    assert (results / "defense_result.pt").read_bytes() != earlier["defense_result.pt"]


def test_a_disk_without_any_room_is_one_sentence(workplace: Path, small_disk: Path):
    shutil.copytree(workplace / "record", small_disk / "record")
    fill(small_disk, leave=0)
    ran = call_fmp(*SHORT, "--record_root", str(small_disk / "record"))
    assert ran.code == 2 and "Traceback" not in ran.err
    assert ran.err.splitlines()[-1].startswith("fmp: ") and "cannot be written (No space left on device)" in ran.err


def test_a_read_only_disk_is_one_sentence(workplace: Path, small_disk: Path):
    shutil.copytree(workplace / "record", small_disk / "record")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    ran = call_fmp(*SHORT, "--record_root", str(small_disk / "record"))
    assert ran.code == 2 and ran.err.startswith("fmp: ") and ran.err.count("\n") == 1
    assert f"{RECORD} is not writable" in ran.err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_one_sentence(workplace: Path):
    (workplace / "record" / RECORD).chmod(0o555)
    ran = call_fmp(*SHORT)
    (workplace / "record" / RECORD).chmod(0o755)
    assert ran.code == 2 and "is not writable" in ran.err
