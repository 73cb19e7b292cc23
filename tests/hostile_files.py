"""Hostile pickles, torch files and archives, byte by byte."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

RECORD = "badnet_tiny"
FILE = Path("record") / RECORD / "attack_result.pt"
PNG = Path("record") / RECORD / "bd_test_dataset" / "3" / "3.png"
TERA = 10**12
TOUCH = "touch pwned"


class Case(NamedTuple):
    """``damage(root)`` spoils a fresh workplace; ``says`` must occur in the refusal; ``flags`` go to the command."""

    damage: Callable[[Path], object]
    says: str
    flags: tuple[str, ...] = ()


class Call:
    """Pickles as a call of ``function(*arguments)``, with ``state`` for ``__setstate__`` if given."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


def torch_bytes(obj: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    return buffer.getvalue()


def content_of(root: Path) -> dict[str, Any]:
    return torch.load(root / FILE, weights_only=False)  # our own file


def edit(*path: Any, value: Any) -> Callable[[Path], object]:
    """Save the record again with ``value`` (or what ``value()`` gives) at the key path."""

    def damage(root: Path) -> None:
        content = content_of(root)
        target: Any = content
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value() if callable(value) else value
        torch.save(content, root / FILE)

    return damage


def write(make: Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda root: (root / FILE).write_bytes(make())


def torch_zip(pickled: bytes, storages: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file as torch.save lays it out, around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", b"little")
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
    return buffer.getvalue()


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def pickled(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def tensor(numbers: int, offset: int, size: list[int], stride: list[int]) -> bytes:
    """``_rebuild_tensor_v2`` of a float storage ``0`` of ``numbers`` numbers."""
    numbers_of = [b"(" + b"".join(map(integer, values)) + b"t" for values in (size, stride)]
    storage = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + integer(numbers) + b"tQ"
    hooks = name("collections", "OrderedDict") + b")R"
    return (
        name("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + storage
        + integer(offset)
        + b"".join(numbers_of)
        + b"\x89"
        + hooks
        + b"tR"
    )


def array(shape: int, told: int) -> bytes:
    """A numpy array that is made with ``shape`` elements and then told to have ``told``."""
    dtype = name("numpy", "dtype") + b"(" + text("f8") + b"\x89\x88tR"
    dtype += b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    made = (
        name("numpy.core.multiarray", "_reconstruct")
        + b"("
        + name("numpy", "ndarray")
        + integer(shape)
        + b"\x85"
        + text("b")
        + b"tR"
    )
    return made + b"(K\x01" + integer(told) + b"\x85" + dtype + b"\x89" + text("x") + b"tb"


def codec_bomb(codec: str, times: int) -> bytes:
    call = name("_codecs", "encode")
    inner = call + text("a" * 9) + text("latin1") + b"\x86R"
    for _ in range(times):
        inner = call + inner + text(codec) + b"\x86R"
    return inner


def laughs(depth: int = 60, width: int = 10) -> list[Any]:
    """Lists that hold the same list ten times, 60 deep: 600 references, whose text has 10**60 letters."""
    inner: list[Any] = [0] * width
    for _ in range(depth):
        inner = [inner] * width
    return inner


def keep(tenths: int) -> Callable[[Path], object]:
    def damage(root: Path) -> None:
        whole = (root / FILE).read_bytes()
        (root / FILE).write_bytes(whole[: len(whole) * tenths // 10])

    return damage


def flip(find: Callable[[bytes], int]) -> Callable[[Path], object]:
    """Flip bits of the byte at ``find(content)``."""

    def damage(root: Path) -> None:
        data = bytearray((root / FILE).read_bytes())
        data[find(bytes(data))] ^= 0x5A
        (root / FILE).write_bytes(data)

    return damage


def tar_file() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for part in ("storages", "tensors", "pickle", "../../pwned"):
            data = pickle.dumps(Call(os.system, TOUCH), 2)
            info = tarfile.TarInfo(part)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def named_zip(*names: str) -> Callable[[], bytes]:
    def make() -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for part in names:
                archive.writestr(part, pickle.dumps({"model": 1}, 2))
        return buffer.getvalue()

    return make


def overlapping_zip() -> bytes:
    """Ten thousand entries that share the same megabyte (a zip bomb without compression)."""
    whole = torch_zip(pickle.dumps({}, 2), {"0": bytes(2**20)})
    end = whole.rindex(b"PK\x05\x06")
    start = struct.unpack("<I", whole[end + 16 : end + 20])[0]
    directory = whole[start:end]
    last = directory[directory.rindex(b"PK\x01\x02") :]
    entries = directory + last * 9_997
    footer = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 10_000, 10_000, len(entries), start, 0)
    return whole[:start] + entries + footer


def claiming_zip() -> bytes:
    """The directory says that a storage has four gigabytes."""
    whole = bytearray(torch_zip(pickled(tensor(2**30 - 1, 0, [4], [1])), {"0": bytes(16)}))
    last = whole.rindex(b"PK\x01\x02")
    whole[last + 20 : last + 28] = struct.pack("<2L", 2**32 - 4, 2**32 - 4)
    return bytes(whole)


def encrypted_zip() -> bytes:
    whole = bytearray(torch_zip(pickle.dumps({}, 2)))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        whole[whole.index(signature) + offset] |= 1
    return bytes(whole)


def legacy(body: bytes) -> bytes:
    """A file of torch before 1.6."""
    facts = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, facts)]
    return b"".join(head) + body + pickle.dumps([], 2)


def sparse(size: int, file: Path = FILE) -> Callable[[Path], object]:
    """A file that claims ``size`` bytes and takes none."""
    return lambda root: os.truncate(root / file, size)
