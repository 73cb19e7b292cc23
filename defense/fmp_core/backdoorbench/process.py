"""Processes of BackdoorBench: started on the shims, listened to, and ended together with everything they started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

from fmp_core.errors import UserError
from fmp_core.system.processes import stop

SHIMS = Path(__file__).resolve().with_name("shims.py")
HEARTBEAT = 30.0  # seconds between lines that say that a script whose output is not shown still runs
PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)

Given = ParamSpec("Given")
Answer = TypeVar("Answer")


@dataclass
class Ended:
    """How a script ended: its exit code (negative: the signal that killed it), seconds, and the last error it printed."""

    code: int
    seconds: float
    last_error: str

    def __str__(self) -> str:
        if self.code < 0:
            name = signal.Signals(-self.code).name
            return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        return f"exit code {self.code}" + (f" ({self.last_error})" if self.last_error else "")


def reason_of(output: str) -> str:
    """Why a program failed: the line that ends the last traceback, whatever the exception is called, or what argparse said
    (``ft.py: error: ...``); without either, the last line."""
    found = re.findall(r"Traceback \(most recent call last\).*\n(?:[ \t].*\n|\n)*(\S.*)|(.*: error: .*)", output)
    return ("".join(found[-1]) if found else output.strip().rpartition("\n")[2]).strip()[:500]


def run_script(
    folder: Path,
    script: str,
    arguments: Sequence[str],
    *,
    gpus: str | None,
    python: str,
    log: Path,
    echo: bool = True,
    adapted: Mapping[str, str] | None = None,
) -> Ended:
    """Run ``script`` (relative to the workspace ``folder``) on the shims; everything it prints goes to ``log`` as it comes and,
    with ``echo``, to the terminal, where else a line every half minute says that it runs.

    The script is the head of a process group of its own, which ends with it, and on Linux also if this process is killed.
    ``gpus`` are those that it sees, as ``CUDA_VISIBLE_DEVICES`` names them; None for all that we see. ``adapted`` are
    environment variables that the shims act on.
    """
    program = shutil.which(python)
    if program is None:
        raise UserError(f"--python {python} is not a program; name the Python that BackdoorBench runs on.")
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg"}
    environment.pop("PYTHONPATH", None)  # ours would shadow BackdoorBench's modules
    environment |= adapted or {}
    if gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpus
    command = [os.path.abspath(program), str(SHIMS), script, *arguments]
    started, used = time.monotonic(), _children_seconds()
    with open(log, "w+", encoding="utf-8") as file, _started(command, folder, environment) as process:
        assert process.stdout is not None
        if not echo:
            threading.Thread(target=_heartbeat, args=(process, log), daemon=True).start()
        for line in process.stdout:
            file.write(line)
            file.flush()
            if echo:
                print(line, end="", flush=True)
        code, seconds = process.wait(), time.monotonic() - started
        file.seek(0)
        printed = file.read()
        end = f"\nexit code {code} after {seconds:.0f} s; CPU {_children_seconds() - used:.0f} s\n"
        file.write(end)
    if not log.exists():  # mcr removes the folder of its results
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(printed + end, encoding="utf-8")
    return Ended(code, seconds, reason_of(printed) if code else "")


def _children_seconds() -> float:
    """CPU seconds of all processes that we started and that have ended: on a crowded machine what a defense costs."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


@contextlib.contextmanager
def _started(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        preexec_fn=_dying_with(os.getpid()),
    )
    try:
        yield process
    finally:
        stop([process])


def _dying_with(parent: int) -> Callable[[], None] | None:
    """For a new process: end when ``parent`` does, which SIGKILL (a sweep's, the kernel's) gives no time to see to."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here, since between fork and exec as little as possible should happen

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return ask


def _heartbeat(process: subprocess.Popen[str], log: Path) -> None:
    started = time.monotonic()
    while True:
        try:
            process.wait(HEARTBEAT)
            return
        except subprocess.TimeoutExpired:
            last = log.read_text(encoding="utf-8").strip().rpartition("\n")[2]
            print(f"      {time.monotonic() - started:.0f} s: {last[:100]}", flush=True)


def in_own_process(function: Callable[Given, Answer], *args: Given.args, **kwargs: Given.kwargs) -> Answer:
    """``function(*args, **kwargs)`` in a process that ends with it: torch and a record take memory that BackdoorBench, which
    runs next, may need. Raises UserError as ``function`` does, and if the process is killed."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool:
            raise UserError(
                "The process that reads the record was killed, perhaps because memory ran out; free some."
            ) from None
        except BaseException:
            for child in active_children():
                child.terminate()
            raise
