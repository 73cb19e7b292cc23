"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .errors import UserError


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on a clean exit fsync it and rename it over ``path``.

    After an exception (or a kill) ``path`` is what it was before. The temporary name keeps the suffix, because
    matplotlib and pandas choose the format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    # mkstemp makes private files; results should have the permissions any other new file gets.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    # A rename is durable only when the folder entry is; Windows cannot open folders, and needs no such call.
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_disks() -> None:
    """Return when everything written so far will survive a power cut (where the system can say so)."""
    if hasattr(os, "sync"):
        os.sync()


def make_folders(*folders: Path) -> None:
    """Make all of ``folders``, or none of them.

    Raises:
        UserError: a name is taken by a file, or a parent is not writable.
    """
    for folder in folders:
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            reason = "is not writable" if parent.is_dir() else "is a file"
            raise UserError(f"Folder {folder} cannot be made, because {parent} {reason}; choose another or free the name.")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_torch(path: str | Path, obj: Any) -> None:
    """``torch.save(obj)`` to ``path``, whole or not at all."""
    with replacing(path) as temporary:
        torch.save(obj, temporary)
