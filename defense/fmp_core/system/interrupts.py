"""SIGTERM, as Slurm and torchrun send it, ends a run the way Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """The process got SIGTERM."""


@contextmanager
def stopping_gently() -> Iterator[None]:
    """Raise :class:`Terminated` in the block on SIGTERM, so that locks, files and checkpoints are left in order."""

    def stop(_signal: int, _frame: Any) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
