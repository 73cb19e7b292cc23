"""Reading torch files from strangers: tensors and plain data come out, nothing is executed."""

from __future__ import annotations

import io
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmp_core.errors import UserError
from fmp_core.storage.files import LARGEST_FILE
from fmp_core.storage.placeholders import PLAIN, Callee, RefusedError
from fmp_core.storage.unpickler import read_pickle

MOST_DIMENSIONS = 64  # torch's own limit


@dataclass(frozen=True, slots=True)
class _StorageKind:
    """Stands for a storage class of torch, such as ``torch.FloatStorage``."""

    dtype: torch.dtype


_SAME_NAME = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Bool")
_STORAGES = {"Char": torch.int8, "Byte": torch.uint8, **{name: getattr(torch, name.lower()) for name in _SAME_NAME}}


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_grad_hooks_metadata: Any) -> Tensor:
    """A view of a storage. One that repeats elements, and so claims memory the file does not hold, is refused."""
    shaped = all(type(part) in (tuple, list) and len(part) <= MOST_DIMENSIONS for part in (size, stride))
    if not (shaped and isinstance(storage, Tensor) and all(type(n) is int and n >= 0 for n in (offset, *size, *stride))):
        raise ValueError("a tensor without numbers")
    if math.prod(size) > len(storage):
        raise ValueError(f"a tensor of shape {tuple(size)[:8]} claims more numbers than the {len(storage)} that are stored")
    return torch.empty(0, dtype=storage.dtype).set_(storage.untyped_storage(), offset, size, stride)  # torch checks bounds


def _size(numbers: Any = ()) -> tuple[Any, ...]:
    if type(numbers) not in (tuple, list) or len(numbers) > MOST_DIMENSIONS:
        raise ValueError("a torch.Size of no numbers")
    return tuple(numbers)


NAMES: dict[str, Any] = {
    **PLAIN,
    **{f"torch.{name}Storage": _StorageKind(dtype) for name, dtype in _STORAGES.items()},
    "torch._utils._rebuild_tensor": Callee(_tensor),
    "torch._utils._rebuild_tensor_v2": Callee(_tensor),
    "torch._utils._rebuild_parameter": Callee(lambda data, *_grad_and_hooks: data),
    "torch.Size": Callee(_size),
}


class NotDataError(UserError):
    """A file of torch asks for more than data."""


def load_torch_file(path: Path, known_only: bool = False) -> Any:
    """What ``torch.load`` gives on the CPU, for files of tensors, numpy arrays, PIL images (as data) and plain values.

    Values of other harmless types come as :class:`~fmp_core.storage.placeholders.Opaque`; a state dict keeps torch's
    ``_metadata``. Memory stays within a small multiple of the file's size. ``known_only``: see
    :func:`~fmp_core.storage.unpickler.read_pickle`. Raises UserError if the file is missing, truncated or damaged,
    NotDataError if it asks for anything but data (named).
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; check --result_file and --record_root.")
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise ValueError(f"it is larger than {LARGEST_FILE // 2**30} GiB")
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise ValueError("it is no zip file, as torch writes them since 1.6")
            with zipfile.ZipFile(file) as archive:
                return _read_zip(archive, size, known_only)
    except RefusedError as error:
        advice = "and a record may hold data only; do not trust this file" if error.runs_code else "which is not plain data"
        raise NotDataError(f"{path} was refused: its pickle asks for {error}, {advice}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None
    except Exception as error:  # damaged bytes can fail anywhere below
        detail = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"{path} is not a whole torch file ({detail[:200].rstrip('.')}); it may be truncated: copy it again. "
            "If it is of another format (torch before 1.6, safetensors, TorchScript), torch.save what it holds."
        ) from None


def _read_zip(archive: zipfile.ZipFile, size: int, known_only: bool) -> Any:
    parts = {part.filename: part for part in archive.infolist()}
    # torch stores uncompressed. So no part can be larger than the file: neither a bomb nor a claim.
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts.values()):
        raise ValueError("its parts are compressed")
    if sum(part.file_size for part in archive.infolist()) > size:
        raise ValueError("its parts claim more bytes than the file has")
    if len({name.lower() for name in parts}) < len(archive.infolist()):  # another reader may take another of them
        raise ValueError("two of its parts have the same name")
    roots = [name.removesuffix("data.pkl") for name in parts if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("a zip file without one data.pkl")
    root, storages = roots[0], {}
    if parts.get(f"{root}byteorder") and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine")

    def storage(identity: Any) -> Tensor:
        """That of the persistent id ``("storage", kind, key, location, numbers, ...)``."""
        fields: list[Any] = list(identity) if type(identity) is tuple else [None] * 5
        word, kind, key, _location, numbers, *view = fields
        plain = word == "storage" and isinstance(kind, _StorageKind) and isinstance(key, str)
        if not plain or type(numbers) is not int or numbers < 0 or view not in ([], [None]):
            raise RefusedError("an unknown kind of storage")
        if key not in storages:
            storages[key] = _storage(archive, parts[f"{root}data/{key}"], kind.dtype, numbers)
        if storages[key].dtype != kind.dtype:
            raise ValueError(f"storage {key} has two types")
        return storages[key]

    return read_pickle(io.BytesIO(archive.read(f"{root}data.pkl")), NAMES, storage, known_only)


def _storage(archive: zipfile.ZipFile, part: zipfile.ZipInfo, dtype: torch.dtype, numbers: int) -> Tensor:
    if numbers * dtype.itemsize != part.file_size:
        raise ValueError(f"a storage claims {numbers} numbers, but has {part.file_size} bytes")
    tensor = torch.empty(numbers, dtype=dtype)
    rest = memoryview(tensor.view(torch.uint8).numpy().data) if numbers else memoryview(b"")
    with archive.open(part) as source:
        while rest:
            chunk = source.read(min(2**22, len(rest)))
            if not chunk:
                raise EOFError("its storages are cut off")
            rest[: len(chunk)] = chunk
            rest = rest[len(chunk) :]
    return tensor
