"""Confidence intervals of the figures a report states."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

Z = 1.959963984540054  # two-sided 95 %


class Interval(NamedTuple):
    """A figure and its 95 % confidence limits."""

    value: float
    low: float
    high: float


def wilson(share: float, total: int) -> Interval:
    """Wilson's score interval of a proportion ``share`` observed on ``total`` images (Wilson 1927)."""
    centre = (share + Z * Z / (2 * total)) / (1 + Z * Z / total)
    half = Z / (1 + Z * Z / total) * math.sqrt(share * (1 - share) / total + Z * Z / (4 * total * total))
    return Interval(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def difference(first: Interval, second: Interval) -> Interval:
    """``first - second`` by the square-and-add rule (Newcombe 1998), as if the two were independent.

    Proportions of one test set before and after a defense agree on most images, so this interval is wider than it need be.
    """
    value = first.value - second.value
    low = math.hypot(first.value - first.low, second.high - second.value)
    high = math.hypot(first.high - first.value, second.value - second.low)
    return Interval(value, value - low, value + high)


def defense_effectiveness(before: Mapping[str, Interval], after: Mapping[str, Interval]) -> Interval:
    """DER, half of (ASR drop - Acc drop + 1), with limits from those of the two drops; a gain counts as no drop."""
    asr_drop = _at_least_zero(difference(before["test_asr"], after["test_asr"]))
    acc_drop = _at_least_zero(difference(before["test_acc"], after["test_acc"]))
    return Interval(*((part + 1) / 2 for part in difference(asr_drop, acc_drop)))


def _at_least_zero(interval: Interval) -> Interval:
    return Interval(*(max(0.0, part) for part in interval))
