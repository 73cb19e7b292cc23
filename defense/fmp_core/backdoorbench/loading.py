"""``torch.load`` in BackdoorBench's process: it executes what its own run and our copies hold. Loaded by ``shims.py``."""

from __future__ import annotations

import inspect
import os
import time
from typing import Any

import torch

STRANGERS = ("record", "data")  # folders of the workspace whose files are not BackdoorBench's
CLOCK = 2.0  # seconds by which a file system's clock may differ from ours


def begin(root: str) -> None:
    """From now on read whole pickles, as before torch 2.6, only in files below ``root``, where our copies of the record and of
    a result lie, in BackdoorBench's own, and in those written since. Others (a stranger's ``defense_result.pt`` that a flag
    names) are read as weights: plain data, or torch's error.
    """
    load, began = torch.load, time.time() - CLOCK
    folders = [os.path.realpath(root), os.path.realpath(torch.hub.get_dir())]  # the second is the user's cache
    folders += [os.path.realpath(os.path.join(root, name)) for name in os.listdir(root) if name not in STRANGERS]
    can_refuse = "weights_only" in inspect.signature(load).parameters  # since torch 1.13

    def trusted(file: Any) -> bool:
        name = getattr(file, "name", file)
        if not isinstance(name, (str, os.PathLike)):
            return False
        path = os.path.realpath(name)
        # A file's last change, unlike its modification, is what no archive can set.
        return any(path.startswith(folder + os.sep) for folder in folders) or os.stat(path).st_ctime >= began

    def load_checked(f: Any, *args: Any, **kwargs: Any) -> Any:
        whole = trusted(f)
        if can_refuse:
            kwargs["weights_only"] = kwargs.get("weights_only") or not whole
        elif not whole:
            raise RuntimeError(f"{f} is a pickle of unknown origin, which this torch cannot read safely")
        return load(f, *args, **kwargs)

    torch.load = load_checked
