"""Where a run's messages go: plain lines on the terminal, and all of them with time and place in a log file."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from pprint import pformat
from typing import Any

from tqdm import tqdm

from fmp_core.errors import UserError
from fmp_core.settings import Settings

LOGGER = logging.getLogger("fmp_core")
# BackdoorBench's, so that its readers of logs read ours.
FILE_FORMAT = logging.Formatter("%(asctime)s [%(levelname)-8s] [%(filename)s:%(lineno)d] %(message)s", "%Y-%m-%d:%H:%M:%S")


class LogFile(logging.FileHandler):
    """A log file whose disk may be full: then one line on the terminal says so, and the run goes on without it."""

    full = False
    found: tuple[int, bool]  # level and propagation of the logger before

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.full:
            self.full = True
            print(f"The log {self.baseFilename} cannot be written ({error.strerror}).", file=sys.stderr)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class Terminal(logging.Handler):
    """Messages as they are, on stderr, above a progress bar if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        if self.level <= logging.DEBUG or not getattr(record, "file_only", False):
            tqdm.write(self.format(record), file=sys.stderr)


def set_up(folder: Path, settings: Settings, about: Mapping[str, Any] | None = None) -> Path:
    """Log everything to ``<folder>/<time>.log``, and to the terminal what ``--log_level`` and ``--quiet`` ask for.

    The first record of the file, as in BackdoorBench, is the whole of ``about`` (default: the settings) and the command line.
    Raises UserError if the file cannot be made; else returns its path.
    """
    close()
    path = folder / f"{time.strftime('%Y_%m_%d_%H_%M_%S')}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while path.exists() or path.is_symlink():  # a stranger may have laid a link there
            path = path.with_name(f"{path.stem}_.log")
        file = LogFile(path, "x", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(
            f"The log {path} cannot be written ({error.strerror or error}); free disk space or give --log."
        ) from None
    file.setFormatter(FILE_FORMAT)
    file.found = (LOGGER.level, LOGGER.propagate)
    LOGGER.addHandler(file)
    LOGGER.addHandler(Terminal("WARNING" if settings.quiet else settings.log_level.upper()))
    LOGGER.setLevel(logging.DEBUG)
    LOGGER.propagate = False
    to_file(pformat({**(dataclasses.asdict(settings) if about is None else about), "terminal_info": sys.argv}))
    return path


def to_file(message: str) -> None:
    """Log what is too long for the terminal; it is shown there with ``--log_level debug`` only."""
    LOGGER.info("%s", message, extra={"file_only": True}, stacklevel=2)


def is_shown() -> bool:
    """Whether messages of level INFO reach a terminal."""
    shown = [handler for handler in LOGGER.handlers if not isinstance(handler, LogFile)]
    return LOGGER.isEnabledFor(logging.INFO) and (not shown or min(handler.level for handler in shown) <= logging.INFO)


def close() -> None:
    """Close the log file, let the terminal be, and leave the logger as :func:`set_up` found it, if that was called."""
    for handler in [handler for handler in LOGGER.handlers if isinstance(handler, (LogFile, Terminal))]:
        if isinstance(handler, LogFile):
            level, LOGGER.propagate = handler.found
            LOGGER.setLevel(level)
        LOGGER.removeHandler(handler)
        handler.close()


def silence() -> None:
    """Show errors only: for all but the first of several processes."""
    LOGGER.setLevel(logging.ERROR)
