"""One process at a time: lock files, on every system and on folders shared between machines (by filelock)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from fmp_core.errors import UserError
from fmp_core.storage.files import writing

ANOTHER_RUN = "Another run works in {folder}; wait for its end (--wait does), or give this run another --defense_name."


def result_lock(folder: Path) -> str:
    """The name of the lock, beside a result folder, of the sweep or run_defense.py that writes into it."""
    return f".{folder.name}.lock"


@contextlib.contextmanager
def locked(
    folder: Path, wait: bool, busy: str = ANOTHER_RUN, name: str = ".lock", give_up: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Hold the lock file ``name`` in ``folder`` (made if missing). The system lets go when the process ends, however it ends.

    The file is empty and stays. Raises UserError if it is a link (a stranger may have made the folder) or cannot be written,
    and the sentence ``busy``, of which ``{folder}`` is filled in, if another process holds it and ``wait`` is False, or
    ``give_up`` says so, which is asked every second.
    """
    path = folder / name
    lock = filelock.FileLock(path, timeout=1 if wait else 0)
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            raise UserError(f"{path} is a link, and was refused; remove it.")
        while not lock.is_locked:
            try:
                lock.acquire()
            except filelock.Timeout:
                if not wait or give_up():
                    raise UserError(busy.replace("{folder}", str(folder))) from None
    try:
        yield
    finally:
        lock.release()
