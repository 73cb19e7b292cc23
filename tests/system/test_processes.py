"""Processes that we started end with all they started, gently if they can."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from fmp_core.system.processes import stop

PATIENCE = 120.0  # seconds; what is waited for takes far less, on any machine
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")


@contextlib.contextmanager
def started(script: str, folder: Path) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """A shell that heads a process group of its own, once it has said that it is ready, and what it prints."""
    with subprocess.Popen(
        ["sh", "-c", script], cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            yield process, process.stdout
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def test_a_process_has_time_to_leave_its_files_in_order(tmp_path: Path) -> None:
    with started("trap 'touch tidy; exit 3' TERM; echo ready; sleep 900 & wait", tmp_path) as (process, _):
        stop([process], grace=PATIENCE)
        assert process.returncode == 3 and (tmp_path / "tidy").exists()


def test_who_does_not_listen_is_killed_with_all_it_started(tmp_path: Path) -> None:
    """The child holds the pipe, too, which closes only when both have ended."""
    with started("trap '' TERM; sleep 900 & echo ready; wait", tmp_path) as (process, printed):
        stop([process], grace=0)
        assert process.returncode == -signal.SIGKILL
        assert select.select([printed], [], [], PATIENCE)[0]


def test_an_ended_process_is_no_error(tmp_path: Path) -> None:
    with started("echo ready", tmp_path) as (process, _):
        process.wait()
        stop([process])
        assert process.returncode == 0
