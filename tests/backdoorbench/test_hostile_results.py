"""Results of strangers that BackdoorBench is to analyse: nothing of them is executed, and nothing written where they point."""

from __future__ import annotations

import io
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from conftest import RECORD
from fmp_core.backdoorbench.run import run_on_record
from fmp_core.backdoorbench.workspace import Job, open_job, workspace
from fmp_core.errors import UserError
from fmp_core.storage.torch_file import load_torch_file


def job(checkout: Path) -> Job:
    return open_job(checkout, "record", RECORD, "data", "cpu")


@pytest.fixture
def results(tiny_record: Path) -> Path:
    folder = tiny_record / "defense" / "echo"
    folder.mkdir(parents=True)
    torch.save({"model": {"w": torch.ones(1)}}, folder / "defense_result.pt")
    return folder


def with_two_directories(first: dict[str, bytes], second: dict[str, bytes]) -> bytes:
    """A zip file with two directories. Its zip64 locator names the end of the ``first``; Python before 3.13.8 takes the one
    that lies directly before the locator, of the ``second``."""
    body = b""

    def stored(name: str, data: bytes) -> bytes:
        nonlocal body
        offset, name_bytes = len(body), name.encode()
        sizes = struct.pack("<3L2H", zlib.crc32(data), len(data), len(data), len(name_bytes), 0)
        body += struct.pack("<4s5H", b"PK\3\4", 20, 0, 0, 0, 0) + sizes + name_bytes + data
        head = struct.pack("<4s6H", b"PK\1\2", 20, 20, 0, 0, 0, 0)
        return head + sizes + struct.pack("<3H2L", 0, 0, 0, 0, offset) + name_bytes

    def end_of(entries: list[bytes]) -> int:
        nonlocal body
        directory, offset = b"".join(entries), len(body)
        numbers = len(entries), len(entries), len(directory), offset
        body += directory + struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, *numbers)
        return offset

    lists = [[stored(name, data) for name, data in parts.items()] for parts in (first, second)]
    end = end_of(lists[0]) + sum(map(len, lists[0]))
    offset, size = end_of(lists[1]), sum(map(len, lists[1]))
    body += struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    return body + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(second), len(second), size, offset, 0)


def parts_of(value: float) -> dict[str, bytes]:
    buffer = io.BytesIO()
    torch.save({"model": {"w": torch.tensor([value])}}, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {"archive/" + name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}


def test_an_analysis_reads_what_we_have_read(checkout: Path, results: Path) -> None:
    """Whatever else the file means to torch: here other weights, which might as well be a call."""
    file = results / "defense_result.pt"
    file.write_bytes(with_two_directories(parts_of(1), parts_of(2)))
    assert torch.load(file, weights_only=False)["model"]["w"].item() == 1
    try:
        ours = load_torch_file(file)["model"]["w"].item()
    except UserError:  # by a Python that knows of such files
        return
    with workspace(job(checkout), analysed="echo") as folder:
        seen = folder / "record" / RECORD / "defense" / "echo" / "defense_result.pt"
        assert torch.load(seen, weights_only=False)["model"]["w"].item() == ours == 2


@pytest.mark.parametrize("link", ["visual", "visual/plot.png"])
def test_an_analysis_does_not_draw_through_links(link: str, checkout: Path, results: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "plot.png").write_text("precious")
    (results / link).parent.mkdir(exist_ok=True)
    (results / link).symlink_to(outside / "plot.png" if "/" in link else outside)
    with pytest.raises(UserError, match="leads out of the record"):
        run_on_record(job(checkout), "echo", "names", sys.executable, [])
    assert (outside / "plot.png").read_text() == "precious"
