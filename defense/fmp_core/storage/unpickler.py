"""Pickles read as data: a small machine that runs the harmless instructions of a pickle and refuses all others.

Python's own unpickler calls what a pickle names, and even torch's restricted one can be made to claim any memory
(``bytearray(10**12)``), to hash tuples a million deep, or to write into numpy's built-in dtypes. Here names stand for the
functions and placeholders of a fixed table, and nothing else can be called, subclassed or written to.
"""

from __future__ import annotations

import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np
from PIL import Image

MOST_INSTRUCTIONS = 20_000_000  # of one pickle; a record of CIFAR-10 has 0.4 million. Each may make an object of 64 bytes.


class RefusedError(Exception):
    """The pickle asks for something that is not data; the message names it."""


class Callee:
    """What a name in a pickle may stand for: a function of ours that the pickle may call."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]):
        self.call = call


class PickledImage:
    """Stands where a pickle names a PIL image: it keeps the state and runs none of Pillow while the file is read."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: Any = ()

    def build(self, state: Any) -> None:
        self.state = state

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


class PickledDtype:
    """A numpy dtype of plain numbers: its code (``f8``) and, from its state, the byte order."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_align_and_copy: Any):
        if not (isinstance(code, str) and re.fullmatch(r"[biuf][1248]", code)):
            raise RefusedError(f"a numpy array of {code[:20] if isinstance(code, str) else 'something'}")
        self.code, self.order = code, "="

    def build(self, state: Any) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise ValueError("a numpy dtype of no byte order")
        self.order = state[1]

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


def _build_array(array: np.ndarray, state: Any) -> None:
    version, shape, dtype, fortran, data = state
    if not isinstance(dtype, PickledDtype):
        raise ValueError("a numpy array without numbers")
    array.__setstate__((version, shape, dtype.numpy(), fortran, _bytes(data)))  # numpy compares the sizes


def _scalar(dtype: PickledDtype, data: bytes) -> Any:
    return np.frombuffer(_bytes(data), dtype.numpy(), 1)[0]


def _bytes(data: Any) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else bytes(memoryview(data))  # Python 2's bytes are read as texts


def _from_buffer(data: Any, dtype: PickledDtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(_bytes(data), dtype.numpy()).reshape(shape, order="F" if order == "F" else "C").copy()


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in protocol 2. Other codecs can multiply a text without end, or take quadratic time."""
    if encoding not in ("latin1", "latin-1"):
        raise RefusedError(f"_codecs.encode to {str(encoding)[:20]}")
    return text.encode("latin1")


PLAIN: dict[str, Any] = {
    "collections.OrderedDict": Callee(lambda pairs=(): OrderedDict((_key(key), value) for key, value in pairs)),
    "builtins.bytes": Callee(lambda: b""),  # so is b"" written in protocol 2; with an argument it could claim any memory
    "_codecs.encode": Callee(_encode),
    "numpy.ndarray": None,  # only ever an argument of _reconstruct
    "numpy.dtype": Callee(PickledDtype),
}
for _core in ("core", "_core"):  # numpy 1 and numpy 2
    PLAIN[f"numpy.{_core}.multiarray._reconstruct"] = Callee(lambda *_: np.empty(0))
    PLAIN[f"numpy.{_core}.multiarray.scalar"] = Callee(_scalar)
    PLAIN[f"numpy.{_core}.numeric._frombuffer"] = Callee(_from_buffer)
IMAGES: dict[str, Any] = {name: Callee(PickledImage) for name in ("PIL.Image.Image", "PIL.PngImagePlugin.PngImageFile")}

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = frozenset(
    [
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "LONG4",
        "BINFLOAT",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    ]
)
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}


def _key(key: Any) -> Any:
    # Hashing a tuple is recursive in C, without a limit: a deep one would end the process.
    if not isinstance(key, (str, bytes, int, float, np.number, type(None))):
        raise RefusedError(f"a {type(key).__name__} as the key of a dict")
    return key


def read_pickle(file: IO[bytes], names: Mapping[str, Any] = PLAIN, persistent: Callable[[Any], Any] | None = None) -> Any:
    """The object of the pickle that starts at the position of ``file``.

    Args:
        names: full name -> :class:`Callee` or a placeholder. Everything else is refused.
        persistent: gives the object of a persistent id, as torch writes for storages.

    Raises:
        RefusedError: it asks for a name outside ``names``, or for an instruction or a call that data does not need.
        ValueError, IndexError, ... : it is damaged.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    arg: Any
    for count, (op, arg, _) in enumerate(pickletools.genops(file)):
        if count == MOST_INSTRUCTIONS:
            raise RefusedError(f"more than {MOST_INSTRUCTIONS} objects")
        name = op.name
        if name in _VALUES:
            stack.append(arg)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            marks.append(stack)
            stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, stack = stack, marks.pop()
            if name == "TUPLE":
                stack.append(tuple(items))
            elif name == "APPENDS":
                _as_list(stack[-1]).extend(items)
            else:
                _as_dict(stack[-1]).update(zip(map(_key, items[::2]), items[1::2], strict=True))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            length = int(name[-1])
            stack[-length:] = [tuple(stack[-length:])]
        elif name == "APPEND":
            item = stack.pop()
            _as_list(stack[-1]).append(item)
        elif name == "SETITEM":
            key, value = stack[-2:]
            del stack[-2:]
            _as_dict(stack[-1])[_key(key)] = value
        elif name == "GLOBAL":
            stack.append(_named(names, *arg.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [_named(names, *stack[-2:])]
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            if not isinstance(stack[-1], Callee) or type(arguments) is not tuple:
                raise RefusedError("a call of what is no function")
            stack[-1] = stack[-1].call(*arguments)
        elif name == "BUILD":
            state = stack.pop()
            _build(stack[-1], state)
        elif name == "BINPERSID" and persistent is not None:
            stack.append(persistent(stack.pop()))
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise RefusedError(f"the instruction {name}")
    raise EOFError("the pickle has no end")


def _named(names: Mapping[str, Any], module: Any, name: Any) -> Any:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise RefusedError("a name that is no text")
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # those of Python 2
    full = f"{module}.{name}"
    if full not in names:
        raise RefusedError(full)
    return names[full]


def _build(instance: Any, state: Any) -> None:
    if type(instance) is np.ndarray:
        _build_array(instance, state)
    elif isinstance(instance, (PickledImage, PickledDtype)):
        instance.build(state)
    elif type(instance) is not OrderedDict:  # whose attributes (torch's _metadata) nobody needs
        raise RefusedError(f"attributes for a {type(instance).__name__}")


def _as_list(target: Any) -> list[Any]:
    if type(target) is not list:
        raise RefusedError(f"items for a {type(target).__name__}")
    return target


def _as_dict(target: Any) -> dict[Any, Any]:
    if type(target) not in (dict, OrderedDict):
        raise RefusedError(f"entries for a {type(target).__name__}")
    return target
