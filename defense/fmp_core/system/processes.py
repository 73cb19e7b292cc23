"""Stopping processes that we started, with everything they started themselves."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Collection
from typing import Any

GRACE = 10.0  # seconds between asking a process group to end and ending it


def stop(processes: Collection[subprocess.Popen[Any]], grace: float = GRACE) -> None:
    """End the process groups that ``processes`` head: by SIGTERM, on which our commands leave locks, checkpoints and temporary
    folders in order, and by SIGKILL what is left after ``grace`` seconds, or at once if this is interrupted, too."""
    try:
        _send(processes, signal.SIGTERM)
        end = time.monotonic() + grace
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, end - time.monotonic()))
    finally:
        _send(processes, signal.SIGKILL)
        for process in processes:
            process.wait()


def _send(processes: Collection[subprocess.Popen[Any]], kind: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, kind)
