"""The verdict: what decides it, and how it is said."""

from __future__ import annotations

import pytest
import torch
from fmp_core.inversion.trigger import ALL_TO_ALL
from fmp_core.inversion.verdict import Verdict, in_words


def test_the_margin_decides():
    close, ahead, few = (
        Verdict("sparse", torch.tensor([0.6, next_best, 0.1, 0.0], dtype=torch.float64), held_out)
        for next_best, held_out in ((0.4, 100), (0.2, 100), (0.2, 49))
    )
    assert close.margin == pytest.approx(0.2) and not close.backdoored
    assert ahead.backdoored and ahead.as_dict()["target"] == 0
    assert few.margin == ahead.margin and few.too_few and not few.backdoored and not ahead.too_few


@pytest.mark.parametrize(
    ("rates", "held_out", "finding"),
    [
        ((0.1, 0.98, 0.2), 100, "a backdoor"),
        ((0.1, 0.3, 0.2), 100, "no backdoor found"),
        ((0, 1, 0.2), 9, "too few images to tell"),
    ],
)
def test_a_verdict_is_one_line(rates: tuple[float, ...], held_out: int, finding: str) -> None:
    line = str(Verdict("sparse", torch.tensor([*rates, 0.0], dtype=torch.float64), held_out))
    assert line == f"sparse triggers flip at most {100 * rates[1]:.1f} % to class 1, then 20.0 % to class 2: {finding}"


def test_a_verdict_names_all_to_all() -> None:
    verdict = Verdict("sparse", torch.tensor([0.1, 0.25, 0.2, 0.98], dtype=torch.float64), 100)
    rates = "98.0 % to the class after their own, then 25.0 % to class 1"
    assert str(verdict) == f"sparse triggers flip at most {rates}: a backdoor"


def test_all_to_all_hides_no_class() -> None:
    """A backdoor towards class 0 sends class 1, three quarters of these images, to the class after their own, too."""
    verdict = Verdict("sparse", torch.tensor([1.0, 0.0, 0.75], dtype=torch.float64), 100)
    assert verdict.backdoored and verdict.target == 0 and verdict.margin == 1
    mutual = Verdict("sparse", torch.tensor([0.9, 0.85, 0.5, 0.98], dtype=torch.float64), 100)
    assert mutual.target == ALL_TO_ALL and mutual.margin == pytest.approx(0.08) and not mutual.backdoored


def test_a_margin_of_exactly_thirty_points_counts_however_it_rounds() -> None:
    verdict = Verdict("sparse", torch.tensor([35 / 50, 20 / 50, 0.0], dtype=torch.float64), 50)
    assert verdict.margin < 0.3 and verdict.backdoored


def test_the_verdict_in_words() -> None:
    def said(*rates: float, held_out: int = 200) -> str:
        return in_words(Verdict("sparse", torch.tensor(rates, dtype=torch.float64), held_out).as_dict())

    assert "backdoored, target class 1. An inverted trigger (sparse) flips the predictions of 90 % of images of other" in said(
        0.1, 0.9, 0.2, 0.3
    )
    assert "backdoored, all-to-all. An" in said(0.1, 0.2, 0.2, 0.9)
    almost = said(0.1, 0.2, 0.497, 0.1)
    assert "not shown to be backdoored, which does not mean clean" in almost and "29.7 points more than the runner-up" in almost
    assert "no verdict, since 20 held-out" in said(0.1, 0.9, 0.2, 0.3, held_out=20) and "50 are needed" in said(
        0, 1, 0, 0, held_out=2
    )
