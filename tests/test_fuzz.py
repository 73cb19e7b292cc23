"""Damaged files, drawn by hypothesis: the readers answer with data or with one sentence, and nothing else."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import poisoned
from fmp_core.data.attack_record import read_attack_record
from fmp_core.data.clean_subset import choose_subset
from fmp_core.data.images import read_images
from fmp_core.data.write_record import AttackedModel, write_attack_record
from fmp_core.errors import UserError
from fmp_core.settings import Settings, load_settings
from fmp_core.storage.torch_file import load_torch_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

EXAMPLES = 2000 if os.environ.get("FMP_SLOW_TESTS") else 60
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """``whole`` with some bytes changed, and perhaps cut off, doubled or filled up."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    start = draw(st.integers(0, len(data)))
    kind = draw(st.sampled_from(["as it is", "cut", "without a piece", "with a piece"]))
    if kind == "cut":
        del data[start:]
    elif kind == "without a piece":
        del data[start : start + draw(st.integers(1, 64))]
    elif kind == "with a piece":
        data[start:start] = draw(st.binary(max_size=64))
    return bytes(data)


def say(error: UserError) -> None:
    assert str(error).isprintable() and 0 < len(str(error)) < 1600


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny record, 20 kB."""
    root = tmp_path_factory.mktemp("fuzz") / "record"
    images = torch.zeros(4, 3, 4, 4, dtype=torch.uint8)
    labels = torch.arange(4)
    write_attack_record(
        root, name="record", model=AttackedModel("m", 4, {"w": torch.ones(3, 3), "b": torch.arange(4)}), dataset="toys",
        bd_train=poisoned(images, labels, [0]), bd_test=poisoned(images, labels, [1, 3]),
    )  # fmt: skip
    yield root
    shutil.rmtree(root)


def test_any_damage_to_a_record_is_refused_or_harmless(folder: Path):
    whole = (folder / "attack_result.pt").read_bytes()
    path = folder / "attack_result.pt"

    @fuzz
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        path.write_bytes(data.draw(damaged(whole)))
        try:
            record = read_attack_record(folder)
        except UserError as error:
            say(error)
        else:
            assert all(isinstance(value, torch.Tensor) for value in record.state.values())
            assert sum(value.nbytes for value in record.state.values()) <= 2 * len(whole)

    before = path.read_bytes()
    try:
        check()
    finally:
        path.write_bytes(before)


@fuzz
@given(data=st.binary(max_size=300))
def test_any_pickle_in_a_zip_is_refused_or_harmless(data: bytes, tmp_path: Path):
    from hostile_files import torch_zip

    (tmp_path / "a.pt").write_bytes(torch_zip(data))
    try:
        load_torch_file(tmp_path / "a.pt")
    except UserError as error:
        say(error)


@fuzz
@given(ops=st.lists(st.sampled_from([*b"(.0123NKJMX]})\x81\x85\x86\x87\x88\x89abceghjlopqrstuQR"]), max_size=60))
def test_any_row_of_instructions_is_refused_or_harmless(ops: list[int], tmp_path: Path):
    """Instructions without sense reach deeper into the machine than random bytes do."""
    from hostile_files import name, pickled, text, torch_zip

    start = name("collections", "OrderedDict") + b"q\x00" + name("numpy", "dtype") + b"q\x01" + text("f8")
    (tmp_path / "a.pt").write_bytes(torch_zip(pickled(start, bytes(ops))))
    try:
        load_torch_file(tmp_path / "a.pt")
    except UserError as error:
        say(error)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP"])
def test_any_damage_to_an_image_is_refused_or_harmless(form: str, tmp_path: Path):
    buffer = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(buffer, format=form)
    path = tmp_path / "a.png"

    @settings(max_examples=max(20, EXAMPLES // 4), deadline=None)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        path.write_bytes(data.draw(damaged(buffer.getvalue())))
        try:
            assert read_images([path], (10, 10, 3)).shape == (1, 3, 10, 10)
        except UserError as error:
            say(error)

    check()


@fuzz
@given(text=st.one_of(st.text(max_size=60), st.text(alphabet="[]{}&*!:-?|>%@`'\"#, \nabe0123456789.", max_size=80)))
def test_any_text_is_settings_or_refused(text: str, tmp_path: Path):
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        assert isinstance(load_settings({"yaml_path": str(tmp_path / "a.yaml")}), Settings)
    except UserError as error:
        say(error)


@fuzz
@given(text=st.one_of(st.text(max_size=60), st.text(alphabet="0123456789.-+einfa_\n\r\t ", max_size=60)))
def test_any_text_is_an_index_or_refused(text: str, tmp_path: Path):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        indices = choose_subset(50, 0.1, 0, str(tmp_path / "a.txt"))
        assert indices and len(set(indices)) == len(indices) and all(0 <= index < 50 for index in indices)
    except UserError as error:
        say(error)
