"""Pickles read as data: a small machine that runs the harmless instructions of a pickle and refuses all others.

Python's own unpickler calls what a pickle names, and even torch's restricted one can be made to claim any memory
(``bytearray(10**12)``), to hash tuples a million deep, or to write into numpy's built-in dtypes. Here names stand for the
functions and placeholders of :mod:`~fmp_core.storage.placeholders`, and nothing else can be called, subclassed or written to.
"""

from __future__ import annotations

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from fmp_core.storage.placeholders import (
    PLAIN,
    Callee,
    Opaque,
    PickledDtype,
    PickledImage,
    RefusedError,
    UnknownClass,
    build_array,
    harmless,
    hashable,
)

MOST_INSTRUCTIONS = 20_000_000  # of one pickle; a record of CIFAR-10 has 0.4 million. Each may make an object of 64 bytes.
MOST_COPIES = 4  # of each byte read so far, in arguments of calls: a pickle can name one text or list again and again
ITEM = 4  # bytes that an item of a list counts for; it takes more in memory, and rarely fewer in the file
LONGEST_NAME = 1000  # letters of a class and its module
WORD = 64  # bits; of larger numbers, arithmetic takes time without end


def read_pickle(
    file: IO[bytes],
    names: Mapping[str, Any] = PLAIN,
    persistent: Callable[[Any], Any] | None = None,
    known_only: bool = False,
) -> Any:
    """The object of the pickle that starts at the position of ``file``.

    Args:
        names: full name -> :class:`Callee` or a placeholder, beside the harmless ones.
        persistent: gives the object of a persistent id, as torch writes for storages.
        known_only: refuse classes outside Python's and torch's libraries, which are placeholders here: for a file that another
            program is going to unpickle for real.

    Raises:
        RefusedError: it asks for a name, an instruction or a call that data does not need; the message says under which key.
        ValueError, IndexError, ... : it is damaged.
    """
    machine = _Machine(names, persistent, known_only)
    try:
        return machine.run(file)
    except RefusedError as error:
        keys = " / ".join(machine.open_keys())
        raise RefusedError(f"{error} (under {keys})" if keys else str(error), error.runs_code) from None


@dataclass
class _Machine:
    names: Mapping[str, Any]
    persistent: Callable[[Any], Any] | None
    known_only: bool
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)  # the stacks below each mark
    memo: dict[int, Any] = field(default_factory=dict)
    bytes_read: Callable[[], int] = int
    copied: int = 0  # bytes in arguments of calls so far

    def run(self, file: IO[bytes]) -> Any:
        start = file.tell()
        self.bytes_read = lambda: file.tell() - start
        for count, (op, arg, _) in enumerate(pickletools.genops(file)):
            if count == MOST_INSTRUCTIONS:
                raise RefusedError(f"more than {MOST_INSTRUCTIONS} objects", runs_code=False)
            if op.name == "STOP":
                return self.stack.pop()
            instruction = _INSTRUCTIONS.get(op.name)
            if instruction is None:
                raise RefusedError(f"the instruction {op.name}")
            instruction(self, arg)
        raise EOFError("the pickle has no end")

    def open_keys(self) -> list[str]:
        """Keys of the dicts that are being filled, outermost first: of each frame the text that was read last."""
        frames = [*self.marks, self.stack][-8:]
        texts = (next((item for item in reversed(frame[-4:]) if isinstance(item, str)), None) for frame in frames)
        return [repr(text[:40]) for text in texts if text is not None]

    # Instructions, by what they do; see pickletools.

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_number(self, value: int) -> None:
        self.stack.append(value if value.bit_length() <= WORD else Opaque("builtins.int"))

    def put(self, arg: int) -> None:
        self.memo[arg] = self.stack[-1]

    def mark(self, _arg: None) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def items(self) -> list[Any]:
        """What was pushed since the last mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def tuple_of(self, length: int) -> None:
        self.stack[-length:] = [tuple(self.stack[-length:])]

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif not isinstance(target, Opaque):
            raise RefusedError(f"items for a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) in (dict, OrderedDict):
            target.update(zip(map(hashable, items[::2]), items[1::2], strict=True))
        elif not isinstance(target, Opaque):
            raise RefusedError(f"entries for a {type(target).__name__}")

    def name(self, module: Any, name: Any) -> Any:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise RefusedError("a name that is no text")
        if len(module) + len(name) > LONGEST_NAME:  # each use of it would be a copy
            raise RefusedError(f"a name of {len(module) + len(name)} letters", runs_code=False)
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # those of Python 2
        full = f"{module}.{name}"
        value = self.names[full] if full in self.names else harmless(full)
        if self.known_only and (isinstance(value, UnknownClass) or (module.startswith("PIL.") and full != "PIL.Image.Image")):
            raise RefusedError(full)  # there are classes in Pillow that write files when they are made
        return value

    def count_copies(self, arguments: Any) -> None:
        """Calls copy their arguments, so these must not be more than the file can hold."""
        for part in (arguments, *arguments) if type(arguments) in (tuple, list) else ():
            if type(part) in (str, bytes, bytearray):
                self.copied += len(part)
            elif type(part) in (tuple, list):
                self.copied += ITEM * len(part)
        if self.copied > MOST_COPIES * self.bytes_read():
            raise RefusedError("the same value again and again", runs_code=False)

    def call(self, _arg: None, makes_object: bool = False) -> None:
        arguments = self.stack.pop()
        self.count_copies(arguments)
        function = self.stack[-1]
        if isinstance(function, UnknownClass) and makes_object:  # an object is made, no code of the class runs
            self.stack[-1] = Opaque(function.name)
        elif isinstance(function, UnknownClass):
            self.stack.pop()
            raise RefusedError(function.name)
        elif isinstance(function, Callee) and type(arguments) is tuple:
            self.stack[-1] = function.call(*arguments)
        else:
            raise RefusedError("a call of what is no function")

    def build(self, _arg: None) -> None:
        state = self.stack.pop()
        self.count_copies(state)
        instance = self.stack[-1]
        if type(instance) is np.ndarray:
            build_array(instance, state)
        elif isinstance(instance, (PickledImage, PickledDtype)):
            instance.build(state)
        elif type(instance) is OrderedDict:  # torch keeps the versions of modules in an attribute
            if type(state) is dict and isinstance(state.get("_metadata"), dict):
                instance._metadata = state["_metadata"]  # type: ignore[attr-defined]
        elif not isinstance(instance, Opaque) or isinstance(instance, UnknownClass):
            raise RefusedError(f"attributes for a {type(instance).__name__}")

    def persistent_id(self, _arg: None) -> None:
        if self.persistent is None:
            raise RefusedError("the instruction BINPERSID")
        self.push(self.persistent(self.stack.pop()))


_VALUES = (
    "BININT BININT1 BININT2 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BYTEARRAY8"
)
_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(_VALUES.split(), _Machine.push),
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, arg: None),
    **dict.fromkeys(("LONG1", "LONG4"), _Machine.push_number),
    "NONE": lambda machine, arg: machine.push(None),
    "NEWTRUE": lambda machine, arg: machine.push(True),
    "NEWFALSE": lambda machine, arg: machine.push(False),
    "EMPTY_DICT": lambda machine, arg: machine.push({}),
    "EMPTY_LIST": lambda machine, arg: machine.push([]),
    "EMPTY_TUPLE": lambda machine, arg: machine.push(()),
    "EMPTY_SET": lambda machine, arg: machine.push(Opaque("builtins.set")),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, arg: machine.push(machine.memo[arg])),
    "MEMOIZE": lambda machine, arg: machine.put(len(machine.memo)),
    "MARK": _Machine.mark,
    "TUPLE": lambda machine, arg: machine.push(tuple(machine.items())),
    "TUPLE1": lambda machine, arg: machine.tuple_of(1),
    "TUPLE2": lambda machine, arg: machine.tuple_of(2),
    "TUPLE3": lambda machine, arg: machine.tuple_of(3),
    "APPEND": lambda machine, arg: machine.append([machine.stack.pop()]),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda machine, arg: machine.append(machine.items())),
    "FROZENSET": lambda machine, arg: machine.push((machine.items(), Opaque("builtins.frozenset"))[1]),
    "SETITEM": lambda machine, arg: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, arg: machine.set_items(machine.items()),
    "GLOBAL": lambda machine, arg: machine.push(machine.name(*arg.split(" ", 1))),
    "STACK_GLOBAL": lambda machine, arg: machine.push(machine.name(machine.stack.pop(-2), machine.stack.pop())),
    "REDUCE": _Machine.call,
    "NEWOBJ": lambda machine, arg: machine.call(arg, makes_object=True),
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent_id,
}
