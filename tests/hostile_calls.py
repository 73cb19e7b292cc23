"""Pickles that would call something; each case says what the refusal must name."""

from __future__ import annotations

import argparse
import collections
import copyreg
import functools
import importlib
import operator
import os
import pty
import shutil
import socket
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hostile_files import (
    TERA,
    TOUCH,
    Call,
    torch_bytes,
)
from PIL import Image

CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "os.system": (lambda: Call(os.system, TOUCH), "posix.system"),
    "eval": (lambda: Call(eval, "open('pwned', 'w')"), "builtins.eval"),
    "exec": (lambda: Call(exec, "open('pwned', 'w')"), "builtins.exec"),
    "import_module": (lambda: Call(importlib.import_module, "antigravity"), "importlib.import_module"),
    "__import__": (lambda: Call(__import__, "antigravity"), "builtins.__import__"),
    "partial": (lambda: functools.partial(os.system, TOUCH), "functools.partial"),
    "a call of a partial": (lambda: Call(functools.partial(os.system, TOUCH)), "functools.partial"),
    "Popen": (lambda: Call(subprocess.Popen, ["touch", "pwned"]), "subprocess.Popen"),
    "check_output in a key": (lambda: {Call(subprocess.check_output, TOUCH): 1}, "subprocess.check_output"),
    "execv": (lambda: Call(os.execv, "/bin/true", ["true"]), "posix.execv"),
    "socket": (lambda: Call(socket.create_connection, ("127.0.0.1", 9)), "socket.create_connection"),
    "pty": (lambda: Call(pty.spawn, "/bin/true"), "pty.spawn"),
    "rmtree": (lambda: Call(shutil.rmtree, "record"), "shutil.rmtree"),
    "open": (lambda: Call(open, "pwned", "w"), "io.open"),
    "getattr": (lambda: Call(getattr, "", "join"), "builtins.getattr"),
    "methodcaller": (lambda: operator.methodcaller("system", TOUCH), "operator.methodcaller"),
    "state of a module": (lambda: torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    "setstate": (lambda: Call(functools.partial, print, state=(os.system, (TOUCH,), {}, {})), "functools.partial"),
    "torch.load": (lambda: Call(torch.load, "other.pt", None), "torch.serialization.load"),
    "torch bytes": (
        lambda: Call(torch.storage._load_from_bytes, torch_bytes(Call(os.system, TOUCH))),
        "torch.storage._load_from_bytes",
    ),
    "torch.jit": (lambda: Call(torch.jit.load, "other.pt"), "torch.jit._serialization.load"),
    "torch.hub": (lambda: Call(torch.hub.load, "a/b", "c"), "torch.hub.load"),
    "np.load": (lambda: Call(np.load, "other.npy", None, True), "numpy.load"),
    "np.savetxt": (lambda: Call(np.savetxt, "pwned", [1.0]), "numpy.savetxt"),
    "np.memmap": (lambda: Call(np.memmap, "pwned", "u1", "w+", 0, (9,)), "numpy.memmap"),
    "bytearray of a terabyte": (lambda: Call(bytearray, TERA), "builtins.bytearray"),
    "storage of a terabyte": (lambda: Call(torch.UntypedStorage, TERA), "torch.storage.UntypedStorage"),
    "sparse tensor": (lambda: torch.ones(2, 2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
    "meta tensor": (lambda: torch.empty(TERA, device="meta"), "torch._utils._rebuild_meta_tensor_no_storage"),
    "quantised tensor": (lambda: Call(torch._utils._rebuild_qtensor, 0), "torch._utils._rebuild_qtensor"),
    "tensor with attributes": (lambda: with_attribute(torch.ones(2)), "torch._tensor._rebuild_from_type_v2"),
    "complex tensor": (lambda: torch.ones(2, dtype=torch.complex64), "torch.ComplexFloatStorage"),
    "wrapper subclass": (
        lambda: Call(torch._utils._rebuild_wrapper_subclass, torch.Tensor),
        "torch._utils._rebuild_wrapper_subclass",
    ),
    "object array": (lambda: np.array([Call(os.system, TOUCH)], dtype=object), "a numpy array of O8"),
    "object array of data": (lambda: np.array([{}, []], dtype=object), "a numpy array of O8"),
    "a set that holds a call": (lambda: {Call(os.system, TOUCH)}, "posix.system (under 'model' / 'gadget')"),
    "a namespace that holds a call": (lambda: argparse.Namespace(x=Call(os.system, TOUCH)), "posix.system"),
    "a defaultdict whose factory calls": (lambda: Call(collections.defaultdict, Call(os.system, TOUCH)), "posix.system"),
    "a deque of a call": (lambda: collections.deque([Call(eval, "open('pwned', 'w')")]), "builtins.eval"),
    "Pillow's open": (lambda: Call(Image.open, "pwned"), "PIL.Image.open"),
    "a class rebuilt of a library": (lambda: Call(copyreg._reconstructor, subprocess.Popen, object, None), "subprocess.Popen"),  # type: ignore[attr-defined]
}


def with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    tensor.gadget = OrderedDict()  # type: ignore[attr-defined]
    return tensor
