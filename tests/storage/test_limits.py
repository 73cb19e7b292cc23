"""Torch files that would be misread, and pickles that have no end in sight."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from fmp_core.errors import UserError
from fmp_core.storage import unpickler
from fmp_core.storage.placeholders import RefusedError
from fmp_core.storage.torch_file import load_torch_file
from hostile_files import pickled, tensor, torch_bytes, torch_zip


def test_a_pickle_of_too_many_objects_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickler, "MOST_INSTRUCTIONS", 100)
    assert unpickler.read_pickle(io.BytesIO(pickle.dumps([None] * 50))) == [None] * 50
    with pytest.raises(RefusedError, match="more than 100 objects") as caught:
        unpickler.read_pickle(io.BytesIO(pickle.dumps([None] * 200)))
    assert not caught.value.runs_code


def test_numbers_of_the_other_byte_order_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    file.write_bytes(torch_bytes({"w": torch.ones(2)}))
    assert load_torch_file(file)["w"].tolist() == [1, 1]
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, b"big" if name.endswith("/byteorder") else content)
    with pytest.raises(UserError, match="written on a big-endian machine"):
        load_torch_file(file)


def test_a_storage_has_one_type(tmp_path: Path) -> None:
    whole = tensor(4, 0, [4], [1])
    file = tmp_path / "a.pt"
    file.write_bytes(torch_zip(pickled(whole, whole, b"\x86"), {"0": bytes(16)}))
    assert [values.dtype for values in load_torch_file(file)] == [torch.float32] * 2
    file.write_bytes(torch_zip(pickled(whole, whole.replace(b"FloatStorage", b"IntStorage"), b"\x86"), {"0": bytes(16)}))
    with pytest.raises(UserError, match="storage 0 has two types"):
        load_torch_file(file)
