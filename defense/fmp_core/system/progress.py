"""Progress bars in a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_EVERY = 30.0  # seconds between log lines where there is no terminal


class Progress:
    """``with Progress("Ranking", total, "maps") as bar: bar.add(n)``."""

    def __init__(self, label: str, total: int, unit: str, logger: logging.Logger):
        self.label, self.total, self.unit, self.logger = label, total, unit, logger
        self.done = 0
        self.bar = tqdm(total=total, desc=label, unit=f" {unit}", disable=not sys.stderr.isatty())

    def __enter__(self) -> Progress:
        self.started = self.spoken = time.monotonic()
        return self

    def add(self, amount: int = 1) -> None:
        self.done += amount
        if self.done > self.total:  # a race's second lap: how long it is shows only then
            self.bar.total = self.total = self.done
        self.bar.update(amount)
        now = time.monotonic()
        if self.bar.disable and now - self.spoken > LINE_EVERY:
            self.spoken = now
            left = (now - self.started) / self.done * (self.total - self.done)
            self.logger.info("%s: %d of %d %s, about %.0f s left", self.label, self.done, self.total, self.unit, left)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
