"""What names in a pickle stand for: plain data, or opaque placeholders for harmless values that nobody reads."""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

LONGEST_KEY = 64  # parts of a tuple; it may be the key of many dicts


class RefusedError(Exception):
    """The pickle asks for something that is not data; the message names it. ``runs_code``: elsewhere it could run code."""

    def __init__(self, message: str, runs_code: bool = True):
        super().__init__(message)
        self.runs_code = runs_code


@dataclass(slots=True, eq=False)
class Callee:
    """What a name in a pickle may stand for: a function of ours that the pickle may call."""

    call: Callable[..., Any]


@dataclass(slots=True, eq=False)
class Opaque:
    """A harmless value that this program does not read, such as a ``torch.device``; what it held is forgotten."""

    name: str

    def __repr__(self) -> str:
        return f"<{self.name}, not read>"


class UnknownClass(Opaque):
    """A class outside Python's and torch's libraries (``Args`` of a script): its instances are opaque, it is never called."""

    __slots__ = ()


class PickledImage:
    """Stands where a pickle names a PIL image: it keeps the state and runs none of Pillow while the file is read."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: Any = ()

    def build(self, state: Any) -> None:
        self.state = state

    @property
    def bytes_held(self) -> int:
        data = self.state[4] if isinstance(self.state, (list, tuple)) and len(self.state) > 4 else b""
        return len(data) if isinstance(data, bytes) else 0

    def decode(self) -> Image.Image:
        """The image. Raises ValueError if the state is not that of a whole RGB or grey image."""
        if not isinstance(self.state, (list, tuple)) or len(self.state) < 5:
            raise ValueError("a pickled image lacks its content")
        _, mode, size, _, data = self.state[:5]
        channels = {"L": 1, "RGB": 3}.get(mode) if isinstance(mode, str) else None
        whole = isinstance(size, (list, tuple)) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
        if channels is None or not whole or not isinstance(data, bytes) or len(data) != size[0] * size[1] * channels:
            raise ValueError(f"a pickled image of mode {str(mode)[:9]} does not fit its bytes")
        return Image.frombytes(mode, tuple(size), data)


@dataclass(slots=True, eq=False)
class PickledDtype:
    """A numpy dtype of plain numbers: its code (``f8``) and, from its state, the byte order."""

    code: str
    order: str = "="

    def build(self, state: Any) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise ValueError("a numpy dtype of no byte order")
        self.order = state[1]

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


def _dtype(code: Any, *_align_and_copy: Any) -> PickledDtype | Opaque:
    if isinstance(code, str) and re.fullmatch(r"[biuf][1248]", code):
        return PickledDtype(code)
    if isinstance(code, str) and re.fullmatch(r"[SU]\d{1,6}", code):
        return Opaque("numpy dtype of texts")
    raise RefusedError(f"a numpy array of {code[:20] if isinstance(code, str) else 'something'}", runs_code=False)


def build_array(array: np.ndarray, state: Any) -> None:
    """Fill ``array`` from the state that numpy pickles; an array of texts stays empty."""
    version, shape, dtype, fortran, data = state
    if isinstance(dtype, Opaque):
        return
    if not isinstance(dtype, PickledDtype):
        raise ValueError("a numpy array without numbers")
    array.__setstate__((version, shape, dtype.numpy(), fortran, _bytes(data)))  # numpy compares the sizes


def _scalar(dtype: PickledDtype | Opaque, data: bytes) -> Any:
    return dtype if isinstance(dtype, Opaque) else np.frombuffer(_bytes(data), dtype.numpy(), 1)[0]


def _bytes(data: Any) -> bytes:
    if type(data) not in (bytes, bytearray, str):
        raise ValueError("a numpy array of no bytes")
    return data.encode("latin1") if isinstance(data, str) else bytes(data)  # Python 2's bytes are read as texts


def _ordered(pairs: Any = ()) -> OrderedDict[Any, Any]:
    if type(pairs) not in (list, tuple):
        raise ValueError("an OrderedDict of no pairs")
    return OrderedDict((hashable(key), value) for key, value in pairs)


def _from_buffer(data: Any, dtype: PickledDtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(_bytes(data), dtype.numpy()).reshape(shape, order="F" if order == "F" else "C").copy()


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in protocol 2. Other codecs can multiply a text without end, or take quadratic time."""
    if encoding not in ("latin1", "latin-1"):
        raise RefusedError(f"_codecs.encode to {str(encoding)[:20]}")
    return text.encode("latin1")


def hashable(key: Any) -> Any:
    """``key`` as the key of a dict; one that is no plain value becomes an :class:`Opaque`, under which nobody looks.

    Hashing a tuple is recursive in C, without a limit: a deep one would end the process. So tuples are never hashed. Whole
    numbers beyond Python's hash modulus can be chosen to collide, which makes a dict take hours.
    """
    if type(key) is int and abs(key) >= sys.hash_info.modulus:
        raise RefusedError("a huge number as the key of a dict", runs_code=False)
    if isinstance(key, (str, bytes, int, float, np.number, type(None), Opaque)):
        return key
    plain = (str, bytes, int, float, np.number, type(None))
    if type(key) is tuple and len(key) <= LONGEST_KEY and all(isinstance(part, plain) for part in key):
        return Opaque("tuple")
    raise RefusedError(f"a {type(key).__name__} as the key of a dict", runs_code=False)


PLAIN: dict[str, Any] = {
    "collections.OrderedDict": Callee(_ordered),
    "builtins.bytes": Callee(lambda: b""),  # so is b"" written in protocol 2; with an argument it could claim any memory
    "_codecs.encode": Callee(_encode),
    "numpy.ndarray": None,  # only ever an argument of _reconstruct
    "numpy.dtype": Callee(_dtype),
}
for _core in ("core", "_core"):  # numpy 1 and numpy 2
    PLAIN[f"numpy.{_core}.multiarray._reconstruct"] = Callee(lambda *_: np.empty(0))
    PLAIN[f"numpy.{_core}.multiarray.scalar"] = Callee(_scalar)
    PLAIN[f"numpy.{_core}.numeric._frombuffer"] = Callee(_from_buffer)

# Constructors of values that hold data and do nothing; and classes without a constructor, which are such values themselves.
_HARMLESS = re.compile(
    r"builtins\.(set|frozenset|complex|slice|range|object)|argparse\.Namespace|types\.SimpleNamespace|copyreg\._reconstructor"
    r"|pathlib\.(_local\.)?\w*Path|collections\.(defaultdict|Counter|deque)|datetime\.\w+|decimal\.Decimal|fractions\.Fraction"
    r"|uuid\.UUID|torch\.device|numpy\.str_"
)
_TYPES = re.compile(
    r"builtins\.(int|float|str|bool|bytes|list|dict|tuple|object|type)|numpy\.(bool_?|u?int\d+|float\d+)"
    r"|torch\.(float|double|half|bfloat16|int|long|short|bool|float\d+|u?int\d+|complex\d+|strided|channels_last|contiguous_format)"
)
_PIL_CLASS = re.compile(r"PIL\.\w+\.(?P<name>[A-Z]\w*)")
_OURS = {"torch", "torchvision", "torchaudio", "numpy", "PIL", *sys.stdlib_module_names}  # what they name is known, or refused


def harmless(full: str) -> Any:
    """What a name that is no plain data may stand for: a :class:`Callee` or an :class:`Opaque`.

    Raises:
        RefusedError: a name of the libraries that does more than hold data.
    """
    image = _PIL_CLASS.fullmatch(full)
    if image:
        is_image = image["name"] == "Image" or image["name"].endswith("ImageFile")
        return Callee(PickledImage) if is_image else Callee(lambda *_: Opaque(full))
    if _HARMLESS.fullmatch(full):
        return Callee(lambda *_: Opaque(full))
    if _TYPES.fullmatch(full):
        return Opaque(full)
    if full.partition(".")[0] not in _OURS:
        return UnknownClass(full)
    raise RefusedError(full, runs_code=not re.fullmatch(r"torch\.(\w+\.)*(_rebuild_\w+|[A-Z]\w*)", full))
