"""The log of a run."""

from __future__ import annotations

import contextlib
import logging
import sys


class LogFile(logging.FileHandler):
    """A log file whose disk may be full: then one line on the terminal says so, and the run goes on without it."""

    full = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.full:
            self.full = True
            print(f"fmp: the log {self.baseFilename} cannot be written ({error.strerror}).", file=sys.stderr)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()
