"""Pickles that ask for more memory or time than their size."""

from __future__ import annotations

import io
import pickle
import struct

import pytest
from fmp_core.storage.placeholders import RefusedError
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
    with pytest.raises(RefusedError, match="the same large value again and again") as caught:
        read(encoded(100_000, 50))
    assert not caught.value.runs_code


def test_small_values_may_be_used_often() -> None:
    assert read(encoded(8, 5000)) == [b"a" * 8] * 5000


def test_protocol_2_may_hold_many_large_bytes() -> None:
    content = {number: bytes([number]) * 5000 for number in range(50)}
    assert read(pickle.dumps(content, protocol=2)) == content


@pytest.mark.parametrize("key", [2**61 - 1, -(2**61) + 1, 2**61, 10**40])
def test_a_key_that_could_be_made_to_collide_is_refused(key: int) -> None:
    with pytest.raises(RefusedError, match="a huge number as the key of a dict"):
        read(pickle.dumps({key: 0}))


def test_usual_whole_numbers_are_keys() -> None:
    content = {0: 1, -5: 2, 2**60: 3, True: 4}
    assert read(pickle.dumps(content)) == content
