"""Command lines: one parser, one way to end, and the timer of a run's stages. Imports no torch, so that ``-h`` answers at once.

A main parses, imports what is heavy, and calls one function::

    def main(argv: list[str] | None = None) -> int:
        parser = Parser("collect", __doc__)
        parser.add_argument(...)
        args = parser.parse_args(argv)
        return run_main("collect", lambda: run(args))
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from fmp_core.errors import UserError

UNCHANGED = "earlier results are unchanged"  # what a run that ends early may say
ADVICE = {  # when memory runs out in a stage
    "ranking": "lower --chunk or --memory",
    "fine-tuning": "lower --batch_size",
    "testing": "lower --batch_size",
}


class Parser(argparse.ArgumentParser):
    """Flags are written out in full; a wrong one ends the program with one sentence and exit code 2.

    Args:
        prog: the name that its sentences begin with; shown in ``--help`` as it is called.
        description: shown as it is written.
    """

    def __init__(self, prog: str, description: str | None = None, **more: Any):
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110),
            allow_abbrev=False,
            **more,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help lists the flags.\n")


class Stages:
    """Seconds that each stage of a run took, those of stages inside it taken off.

    ``with stages("fine-tuning"): ...`` adds to ``stages.seconds["fine-tuning"]``; a ``with stages("testing")`` in that block
    counts as testing only, so that all seconds add up to those of the outer blocks. An exception keeps the name of the
    innermost stage it arose in (:func:`run_main` gives advice by it).
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []  # for each open stage, the seconds of stages inside it

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        except BaseException as error:
            _note(error, "stage", name)
            raise
        finally:
            took = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + took - self._inner.pop()
            if self._inner:
                self._inner[-1] += took


@contextmanager
def kept(words: str) -> Iterator[None]:
    """What the sentence of :func:`run_main` says of the results, if the block ends early (default: UNCHANGED).

    ``with kept("new results are partly written"): write(...)``
    """
    try:
        yield
    except BaseException as error:
        _note(error, "kept", words)
        raise


def _note(error: BaseException, name: str, words: str) -> None:
    """Keep ``words`` on the exception; the innermost block knows best."""
    if not hasattr(error, name):
        setattr(error, name, words)


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


def run_main(prog: str, function: Callable[[], int | None], again: str = "the same command") -> int:
    """Call ``function`` and return the exit code: its own (None is 0), or that of the sentence its error ends in.

    Bad input, a file that fails and a full memory give 2, Ctrl-C 130, SIGTERM (as Slurm and torchrun send it) 143. Errors that
    are nobody's input are raised, with their traceback.

    Args:
        prog: begins the sentence on stderr.
        again: what to run to go on after an interruption.
    """
    try:
        with stopping_gently():
            return function() or 0
    except BrokenPipeError:  # of ``| head``: nobody reads the rest, also not what Python flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except (UserError, OSError, KeyboardInterrupt, RuntimeError, MemoryError) as error:
        ending = _ending(error, again)
        if ending is None:
            raise
        print(f"{prog}: {ending[0]}", file=sys.stderr)
        return ending[1]


def _ending(error: BaseException, again: str) -> tuple[str, int] | None:
    """The sentence and the exit code; None for errors that are nobody's input."""
    results = getattr(error, "kept", UNCHANGED)
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, OSError):
        return str(UserError(f"{error.filename or 'a file'} failed ({error.strerror or error}); {results}.")), 2
    if isinstance(error, KeyboardInterrupt):
        how, code = ("terminated", 143) if isinstance(error, Terminated) else ("interrupted", 130)
        return f"{how}; {results}. Run {again} again to go on from here.", code
    if _is_out_of_memory(error):
        stage = getattr(error, "stage", "load")
        advice = ADVICE.get(stage, "close what else uses it")
        return f"out of memory ({stage}); {advice}, or choose another --device; {results}.", 2
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from fmp_core.system.devices import is_out_of_memory  # imports torch

    return is_out_of_memory(error)
