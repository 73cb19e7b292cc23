"""Runs of the command in processes of their own, forked from one that has torch imported already, for tests of kills."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from conftest import Ran

PATIENCE = 1500.0  # seconds until a run must have come somewhere; a shared core may be fifty times slower than a free one
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fmp", "toy", "fmp_core.report.page", "fmp_core.frg.scorer_state"])


def _work(folder: str, flags: list[str], environment: dict[str, str], out: str, kill_at: int, hold_at: str | None) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{out}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import narrow_resnet  # noqa: F401  # registers the records' model
    import torch
    from fmp_core import command
    from fmp_core.frg import scorer_state

    torch.set_num_threads(1)
    scorer_state.EVERY = 0.0  # a checkpoint after each group of maps
    replaced, genuine = [0], os.replace

    def replace(source: str, target: str) -> None:
        replaced[0] += 1
        if replaced[0] == kill_at:
            os.truncate(source, os.path.getsize(source) // 2)  # as if the kill had come while it was written
            os.kill(os.getpid(), signal.SIGKILL)
        genuine(source, target)
        if hold_at and Path(target).name.startswith(hold_at) and not Path(f"{out}.holds").exists():
            Path(f"{out}.holds").touch()
            while True:
                time.sleep(0.05)

    os.replace = replace
    code = command.main(flags)
    Path(f"{out}.replaced").write_text(str(replaced[0]))
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Run:
    """The command with ``flags`` in ``folder``, started.

    Args:
        kill_at: kills itself where its n-th file would appear under its name, half of it written.
        hold_at: goes no further, until a signal comes, once a file has appeared whose name begins so.
    """

    made = 0

    def __init__(
        self,
        folder: Path,
        *flags: str,
        environment: Mapping[str, str] | None = None,
        kill_at: int = 0,
        hold_at: str | None = None,
    ):
        Run.made += 1
        self.out = folder.parent / f"run{Run.made}"
        arguments = (str(folder), list(flags), dict(environment or {}), str(self.out), kill_at, hold_at)
        self.process = CONTEXT.Process(target=_work, args=arguments)
        self.process.start()
        if hold_at:
            self._until(Path(f"{self.out}.holds").exists)

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def ends_within(self, seconds: float) -> bool:
        self.process.join(seconds)
        return self.process.exitcode is not None

    def finish(self) -> Ran:
        """Wait for the end. A negative code is the signal that killed it."""
        assert self.ends_within(PATIENCE), f"still running after {PATIENCE} s"
        assert self.process.exitcode is not None
        texts = [Path(f"{self.out}.{name}") for name in ("out", "err")]
        return Ran(self.process.exitcode, *(path.read_text() if path.exists() else "" for path in texts))

    def files_written(self) -> int:
        """Of a finished run: how often a file appeared under its name."""
        return int(Path(f"{self.out}.replaced").read_text())

    def _until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition()`` holds; fails if the run ends first."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.is_alive(), self.finish()
            assert time.monotonic() < deadline, "too slow"
            time.sleep(0.01)
