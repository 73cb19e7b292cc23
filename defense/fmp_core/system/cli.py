"""Command lines: one parser, one way to end, and the timer of stages. Imports no torch, so that ``-h`` answers at once."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from fmp_core.errors import UserError, did_you_mean

ADVICE = {  # when memory runs out in a stage
    "ranking": "lower --chunk or --memory",
    "fine-tuning": "lower --batch_size",
}


class Parser(argparse.ArgumentParser):
    """Flags are written out in full; a wrong one ends the program with one sentence and exit code 2."""

    def __init__(self, prog: str, description: str | None = None, **more: Any):
        def formatter(prog: str) -> argparse.HelpFormatter:
            return argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110)

        super().__init__(prog, description=description, formatter_class=formatter, allow_abbrev=False, **more)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([_with_home(word) for word in words], namespace)

    def error(self, message: str) -> NoReturn:
        if unknown := re.match(r"unrecognized arguments: (--\w+)", message):
            message += did_you_mean(unknown[1], self._option_string_actions)
        self.exit(2, f"{self.prog}: {message}; --help lists the flags.\n")


def _with_home(word: str) -> str:
    """``--flag=~/x`` with the user's home, as shells write it in ``--flag ~/x``."""
    flag, given, value = word.partition("=")
    return f"{flag}={os.path.expanduser(value)}" if given and flag.startswith("--") else word


def from_here(path: Path) -> str:
    """``path`` as a word of a command typed in the current folder: relative where it lies below."""
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


class Stages:
    """Seconds that each stage of a run took, those of stages inside it taken off.

    ``with stages("fine-tuning"): ...`` adds to ``stages.seconds["fine-tuning"]``; a ``with stages("testing")`` in that block
    counts as testing only, so that all seconds add up to those of the outer blocks. ``reused`` are stages whose seconds are not
    those of the whole stage, since an earlier run did all or a part of it. ``cpu_elsewhere`` are CPU seconds that other
    processes spent on the run.
    """

    def __init__(self) -> None:
        self._cpu_started = time.process_time()
        self.cpu_elsewhere = 0.0
        self.seconds: dict[str, float] = {}
        self.reused: list[str] = []
        self._inner: list[float] = []  # for each open stage, the seconds of stages inside it

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        self._inner.append(0.0)
        try:
            with _noted("stage", name):
                yield
        finally:
            took = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + took - self._inner.pop()
            if self._inner:
                self._inner[-1] += took

    def cpu_seconds(self) -> float:
        """CPU seconds of all threads since this object was made, and those spent elsewhere."""
        return time.process_time() - self._cpu_started + self.cpu_elsewhere

    def reuse(self, name: str) -> None:
        """Add ``name`` to ``reused``."""
        if name not in self.reused:
            self.reused.append(name)


@contextmanager
def _noted(name: str, words: str) -> Iterator[None]:
    """Keep ``words`` on an exception of the block, for :func:`run_main`; the innermost block knows best."""
    try:
        yield
    except BaseException as error:
        if not hasattr(error, name):
            setattr(error, name, words)
        raise


# with if_it_ends_early("new results are partly written"): what run_main says of the results if the block ends by an exception
if_it_ends_early = partial(_noted, "results_left")


class Terminated(KeyboardInterrupt):
    """The process got SIGTERM, or SIGHUP: its terminal was closed."""


@contextmanager
def _stopping_gently() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block on SIGINT, :class:`Terminated` on SIGTERM and SIGHUP, so that locks, files and
    checkpoints are left in order.

    Signals that are ignored (SIGHUP under nohup) stay so. A signal in the middle of an import may make a library fail otherwise
    (numpy: RecursionError); that is raised as the signal, too.
    """
    came: list[KeyboardInterrupt] = []

    def stop(number: int, _frame: Any) -> None:
        came.append(KeyboardInterrupt() if number == signal.SIGINT else Terminated())
        raise came[-1]

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in map(signal.Signals.__getitem__, names) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        if came:
            came[0].__dict__.update(error.__dict__)  # which results are left
            raise came[0] from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _let_threads_sleep() -> None:
    """Let threads of libgomp, torch's OpenMP on Linux, wait a few microseconds, then sleep; for when torch is not loaded yet.

    By default they spin, which beside another busy process takes the core from the very thread they wait for: training the
    demo's record on two cores was then 50 times slower, and is 2 times slower so. Alone it is as fast.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}.intersection(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "1000"


def run_main(
    prog: str, function: Callable[[], int | None], again: str = "the same command", effect: str = "go on from here"
) -> int:
    """Call ``function`` and return the exit code: its own (None is 0), or that of the sentence its error ends in.

    Bad input, a file that fails and a full memory give 2, Ctrl-C 130, SIGTERM (as Slurm and torchrun send it) 143. Errors that
    are nobody's input are raised, with their traceback.

    Args:
        prog: begins the sentence on stderr.
        again: what to run after an interruption, and ``effect``: to what end.
    """
    _let_threads_sleep()
    os.environ.pop("MPLBACKEND", None)  # plots are files; a notebook's backend need not be installed here
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # a daemon closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be letters of the terminal
    try:
        with _stopping_gently():
            return function() or 0
    except BrokenPipeError:  # of ``| head``: nobody reads the rest, also not what Python flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except (UserError, OSError, KeyboardInterrupt, RuntimeError, MemoryError) as error:
        results, code = getattr(error, "results_left", "earlier results are unchanged"), 2
        if isinstance(error, UserError):
            sentence = str(error)
        elif isinstance(error, OSError):
            sentence = str(UserError(f"{error.filename or 'a file'} failed ({error.strerror or error}); {results}."))
        elif isinstance(error, KeyboardInterrupt):
            how, code = ("terminated", 143) if isinstance(error, Terminated) else ("interrupted", 130)
            sentence = f"{how}; {results}. Run {again} again to {effect}."
        elif _is_out_of_memory(error):
            stage = getattr(error, "stage", "")
            where, advice = f" ({stage})" if stage else "", ADVICE.get(stage, "close what else uses it")
            sentence = f"out of memory{where}; {advice}, or choose another --device; {results}."
        else:
            raise
        print(f"{prog}: {sentence}", file=sys.stderr)
        return code


def _is_out_of_memory(error: BaseException) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from fmp_core.system.devices import is_out_of_memory  # imports torch

    return is_out_of_memory(error)
