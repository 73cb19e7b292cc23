"""Pickles that ask for more memory or time than their size."""

from __future__ import annotations

import io
import pickle
import struct

import numpy as np
import pytest
from fmp_core.storage.placeholders import Opaque, RefusedError
from fmp_core.storage.torch_file import NAMES
from fmp_core.storage.unpickler import read_pickle


def read(content: bytes) -> object:
    return read_pickle(io.BytesIO(content))


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def encoded(length: int, times: int) -> bytes:
    """One text, encoded again and again: each call makes new bytes and is six bytes itself."""
    names = b"c_codecs\nencode\nq\x00" + text("a" * length) + b"q\x01" + text("latin1") + b"q\x02"
    return b"\x80\x02" + names + b"](" + b"h\x00h\x01h\x02\x86R" * times + b"e."


def test_a_large_value_cannot_be_copied_without_end() -> None:
    with pytest.raises(RefusedError, match="the same value again and again") as caught:
        read(encoded(100_000, 50))
    assert not caught.value.runs_code


def test_a_short_list_cannot_be_copied_without_end() -> None:
    """Each six bytes would make a dict of 64 entries."""
    pairs = b"](" + b"".join(b"K" + bytes([key]) + b"N\x86" for key in range(64)) + b"e"
    start = b"\x80\x02](ccollections\nOrderedDict\nq\x00" + pairs + b"\x85q\x01"
    assert len(read(start + b"h\x00h\x01R" * 2 + b"e.")) == 4  # type: ignore[arg-type]
    with pytest.raises(RefusedError, match="the same value again and again"):
        read(start + b"h\x00h\x01R" * 1000 + b"e.")


def test_the_state_of_an_array_cannot_be_copied_without_end() -> None:
    """Whether it is a tuple, as numpy writes it, or a list: a text in it is encoded anew for each array."""
    dtype = b"cnumpy\ndtype\n" + text("u1") + b"\x85R(K\x03" + text("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state = b"](K\x01M\x88\x13\x85" + dtype + b"\x89" + text("\0" * 5000) + b"eq\x01"
    made = b"cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nK\x00\x85" + text("b") + b"\x87q\x03"
    content = b"\x80\x02](" + state + made
    assert len(read(content + b"h\x02h\x03Rh\x01b" * 2 + b"e.")) == 5  # type: ignore[arg-type]
    with pytest.raises(RefusedError, match="the same value again and again"):
        read(content + b"h\x02h\x03Rh\x01b" * 50 + b"e.")


def test_small_values_may_be_used_often() -> None:
    assert read(encoded(8, 5000)) == [b"a" * 8] * 5000


def test_protocol_2_may_hold_many_large_bytes() -> None:
    content = {number: bytes([number]) * 5000 for number in range(50)}
    assert read(pickle.dumps(content, protocol=2)) == content


@pytest.mark.parametrize("key", [2**61 - 1, -(2**61) + 1, 2**61, 2**63])
def test_a_key_that_could_be_made_to_collide_is_refused(key: int) -> None:
    with pytest.raises(RefusedError, match="a huge number as the key of a dict"):
        read(pickle.dumps({key: 0}))


def test_usual_whole_numbers_are_keys() -> None:
    content = {0: 1, -5: 2, 2**60: 3, True: 4}
    assert read(pickle.dumps(content)) == content


def test_a_number_beyond_64_bits_is_not_read() -> None:
    """Arithmetic with large numbers takes time without end, and no record holds one."""
    assert read(pickle.dumps([2**64 - 1, -(2**63)])) == [2**64 - 1, -(2**63)]
    (number,) = read(pickle.dumps([10**5000]))  # type: ignore[misc]
    assert isinstance(number, Opaque)


def test_a_long_name_is_refused() -> None:
    with pytest.raises(RefusedError, match="a name of 5001 letters"):
        read(b"\x80\x04" + text("m" * 5000) + text("n") + b"\x93.")


CALLED = {
    "a torch.Size of a dict": ("torch", "Size", ({},)),
    "a torch.Size of many": ("torch", "Size", (tuple(range(65)),)),
    "an OrderedDict of a dict": ("collections", "OrderedDict", ({"ab": 1},)),
    "a shape of many": ("torch._utils", "_rebuild_tensor_v2", (None, 0, (1,) * 65, (1,) * 65)),
    "an array of an array": ("numpy._core.numeric", "_frombuffer", (np.zeros(1000), np.dtype("u1"), (8000,), "C")),
}


@pytest.mark.parametrize(("module", "name", "arguments"), CALLED.values(), ids=CALLED.keys())
def test_a_call_with_what_could_be_copied_without_end_is_refused(module: str, name: str, arguments: tuple[object, ...]) -> None:
    given = pickle.dumps(arguments, protocol=4)[2:-1]
    content = b"\x80\x04c" + f"{module}\n{name}\n".encode() + given.lstrip(b"\x80") + b"R."
    with pytest.raises((RefusedError, ValueError)) as caught:
        read_pickle(io.BytesIO(content), NAMES)
    assert not isinstance(caught.value, UnicodeDecodeError)


def test_a_shape_that_is_usual_is_read() -> None:
    assert read_pickle(io.BytesIO(b"\x80\x04ctorch\nSize\n" + pickle.dumps(((2, 3),), protocol=4)[2:-1] + b"R."), NAMES) == (
        2,
        3,
    )
