"""95 % confidence intervals of proportions and of their differences.

All of them cover the choice of test images, nothing else: another seed may move a figure further.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

Z = 1.959963984540054  # two-sided 95 %


class Interval(NamedTuple):
    """A figure and its 95 % confidence limits."""

    value: float
    low: float
    high: float


def wilson(share: float, total: int) -> Interval:
    """Wilson's score interval of a proportion ``share`` observed on ``total`` images (Wilson 1927); 0 to 1 of none."""
    if not total:
        return Interval(share, 0.0, 1.0)
    centre = (share + Z * Z / (2 * total)) / (1 + Z * Z / total)
    half = Z / (1 + Z * Z / total) * math.sqrt(share * (1 - share) / total + Z * Z / (4 * total * total))
    return Interval(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def share_of(hits: pd.Series | np.ndarray) -> Interval:
    """The share of True in ``hits``, with Wilson's limits; 0 of none."""
    return wilson(float(hits.mean()) if len(hits) else 0.0, len(hits))


def difference(first: Interval, second: Interval, correlation: float = 0.0) -> Interval:
    """``first - second`` by the square-and-add rule (Newcombe 1998, Statistics in Medicine 17:873, method 10).

    ``correlation`` of the two figures is 0 if they come from different images.
    """
    value = first.value - second.value
    below, above = first.value - first.low, first.high - first.value
    under, over = second.value - second.low, second.high - second.value
    low = math.sqrt(max(0.0, below**2 - 2 * correlation * below * over + over**2))
    high = math.sqrt(max(0.0, above**2 - 2 * correlation * above * under + under**2))
    return Interval(value, value - low, value + high)


def paired_difference(first: np.ndarray, second: np.ndarray) -> Interval:
    """Difference of two shares of the same images (Newcombe 1998, Statistics in Medicine 17:2635, method 10).

    ``first``, ``second``: bool ``[N]``, row by row the same image, such as "correct after" and "correct before".
    """
    total = len(first)
    both, only_first, only_second = (int(hits.sum()) for hits in (first & second, first & ~second, ~first & second))
    neither = total - both - only_first - only_second
    margins = (both + only_first) * (neither + only_second) * (both + only_second) * (neither + only_first)
    product = both * neither - only_first * only_second
    corrected = max(product - total / 2, 0.0) if product > 0 else product
    correlation = corrected / math.sqrt(margins) if margins else 0.0
    return difference(share_of(first), share_of(second), correlation)


def rating(gain: Interval, acc_drop: Interval) -> Interval:
    """Limits of :func:`fmp_core.metrics.ratings` from those of its two parts, which come from different images."""
    gained, lost = (Interval(*(max(0.0, limit) for limit in interval)) for interval in (gain, acc_drop))
    return Interval(*((limit + 1) / 2 for limit in difference(gained, lost)))
