"""Intervals against published examples and their own logic."""

from __future__ import annotations

import pytest
from fmp_core.report.intervals import Interval, defense_effectiveness, difference, wilson


@pytest.mark.parametrize(  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
    ("hits", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(hits: int, total: int, low: float, high: float):
    found = wilson(hits / total, total)
    assert found == pytest.approx((hits / total, low, high), abs=5e-5)


def test_limits_enclose_the_share_even_at_the_ends():
    for share in (0.0, 1.0):
        found = wilson(share, 50)
        assert 0 <= found.low <= share <= found.high <= 1 and found.low < found.high


def test_difference_as_published():  # Newcombe 1998, Statistics in Medicine 17:873, table II, method 10, contrast 56/70 - 48/80
    assert difference(wilson(56 / 70, 70), wilson(48 / 80, 80)) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_der_of_a_useful_and_a_useless_defense():
    before = {"test_acc": wilson(0.92, 10000), "test_asr": wilson(0.98, 9000)}
    good = defense_effectiveness(before, {"test_acc": wilson(0.90, 10000), "test_asr": wilson(0.02, 9000)})
    assert good.value == pytest.approx((0.96 - 0.02 + 1) / 2) and good.low < good.value < good.high < 1
    same = defense_effectiveness(before, before)
    assert same.value == 0.5 and same.low < 0.5 < same.high
    better = defense_effectiveness(before, {"test_acc": wilson(0.95, 10000), "test_asr": Interval(0.99, 0.98, 1.0)})
    assert better.value == 0.5  # gains count as no drop
