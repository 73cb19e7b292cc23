"""One run at a time on one result folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fmp_core.errors import UserError
from fmp_core.storage.files import writing

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"


@contextlib.contextmanager
def locked(folder: Path, wait: bool) -> Iterator[None]:
    """Hold ``folder`` (made if missing) for this process. The system lets go when the process ends, however it ends.

    Raises:
        UserError: another process holds it, and ``wait`` is False; or the folder is not writable.
    """
    path = folder / NAME
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise UserError(
                    f"Another run works in {folder}; wait for its end (--wait does), or give this run another --defense_name."
                ) from None
        yield
    finally:
        os.close(handle)
