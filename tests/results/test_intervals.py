"""Intervals against published examples and their own logic."""

from __future__ import annotations

import numpy as np
import pytest
from fmp_core.results.intervals import Interval, difference, paired_difference, rating, wilson


@pytest.mark.parametrize(  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
    ("hits", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(hits: int, total: int, low: float, high: float):
    assert wilson(hits / total, total) == pytest.approx((hits / total, low, high), abs=5e-5)


def test_limits_enclose_the_share_even_at_the_ends():
    for share in (0.0, 1.0):
        found = wilson(share, 50)
        assert 0 <= found.low <= share <= found.high <= 1 and found.low < found.high
    assert wilson(0.0, 0) == (0, 0, 1)


def test_difference_as_published():  # Newcombe 1998, Statistics in Medicine 17:873, table II, method 10, contrast 56/70 - 48/80
    assert difference(wilson(56 / 70, 70), wilson(48 / 80, 80)) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def pairs(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    counts = (both, first, second, neither)
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ((14, 5, 0, 22), 0.011, 0.226),  # Altman et al. 2000, Statistics with Confidence, table 6.2
        ((1, 1, 7, 12), -0.507, -0.026),  # Fagerland et al. 2014, BMC Medical Research Methodology 14, airway data
    ],
)
def test_paired_difference_as_published(counts: tuple[int, ...], low: float, high: float):
    _, first, second, _ = counts
    assert paired_difference(*pairs(*counts)) == pytest.approx(((first - second) / sum(counts), low, high), abs=5e-4)


def test_pairs_that_agree_make_the_interval_narrower():
    first, second = pairs(9000, 150, 50, 800)
    paired, apart = paired_difference(first, second), difference(wilson(first.mean(), 10000), wilson(second.mean(), 10000))
    assert paired.value == pytest.approx(apart.value) and paired.high - paired.low < 0.5 * (apart.high - apart.low)
    assert paired_difference(*pairs(50, 0, 0, 0)).value == 0  # no margins to correlate
    one_way = paired_difference(*pairs(0, 0, 50, 0))
    assert one_way.value == -1 and -1 <= one_way.low < one_way.high


def test_der_of_a_useful_and_a_useless_defense():
    drop = Interval(0.96, 0.95, 0.97)
    good = rating(drop, Interval(0.02, 0.015, 0.03))
    assert good.value == pytest.approx((0.96 - 0.02 + 1) / 2) and good.low < good.value < good.high < 1
    nothing = Interval(0.0, -0.01, 0.01)
    assert rating(nothing, nothing) == pytest.approx((0.5, 0.495, 0.505))
    gains = rating(Interval(-0.1, -0.12, -0.08), Interval(-0.03, -0.04, -0.02))
    assert gains == (0.5, 0.5, 0.5)  # gains count as no drop
