"""Figures as they are written, for tests that read the data which they show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from matplotlib.figure import Figure


@contextmanager
def figures_written() -> Iterator[list[Figure]]:
    """The figures that are written inside the block, in order."""
    found: list[Figure] = []
    genuine = Figure.savefig

    def savefig(self: Figure, *args: Any, **kwargs: Any) -> None:
        found.append(self)
        genuine(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield found
