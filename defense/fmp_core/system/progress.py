"""Progress bars in a terminal, lines of the log elsewhere."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

from fmp_core.system.logs import is_shown

LINE_EVERY = 30.0  # seconds between log lines where there is no terminal


class Progress:
    """``with Progress("Ranking", total, "maps", logger) as bar: bar.add(n)``; for ranking, fine-tuning and testing alike.

    In a terminal it is a bar, which goes when it is done; ``--quiet`` and ``--log_level warning`` show none. Without a
    terminal, ``logger`` gets a line every 30 seconds.
    """

    def __init__(self, label: str, total: int, unit: str, logger: logging.Logger):
        self.label, self.total, self.unit, self.logger = label, total, unit, logger
        self.done = 0
        hidden = not sys.stderr.isatty() or not is_shown()
        self.bar = tqdm(total=total, desc=label, unit=f" {unit}", disable=hidden, leave=False)

    def __enter__(self) -> Progress:
        self.started = self.last_line = time.monotonic()
        return self

    def add(self, amount: int = 1) -> None:
        """``amount`` more units are done. More than ``total`` in all raise the total: a second pass may follow a first."""
        self.done += amount
        if self.done > self.total:
            self.bar.total = self.total = self.done
        self.bar.update(amount)
        now = time.monotonic()
        if self.bar.disable and now - self.last_line > LINE_EVERY:
            self.last_line = now
            left = (now - self.started) / self.done * (self.total - self.done)
            self.logger.info("%s: %d of %d %s, about %.0f s left", self.label, self.done, self.total, self.unit, left)

    def __exit__(self, *_error: object) -> None:
        self.bar.close()
