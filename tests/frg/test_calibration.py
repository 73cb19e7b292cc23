"""What racing learns from its calibration maps, worked out on paper."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fmp_core.frg.racing import _pooled, calibrate
from fmp_core.frg.scorer import Scored
from fmp_core.models.feature_maps import ConvLayer
from torch import Tensor, nn


class Told:
    """Stands for a scorer of one layer whose margins, ``[maps, images]``, are known."""

    device = torch.device("cpu")

    def __init__(self, margins: Tensor):
        self.layers = [ConvLayer("c", nn.Conv2d(1, len(margins), 1))]
        self.margins, self.total = margins, len(margins)

    def by_batch(self, maps: Tensor, summarise: Callable[[Tensor, Iterator[Scored]], Tensor]) -> list[Tensor]:
        ids = maps.nonzero().flatten()
        return [summarise(torch.arange(self.margins.shape[1]), iter([Scored(ids, ids, self.margins[ids])]))]


def test_an_image_is_undecided_within_four_deviations_and_trusted_beyond_four_and_a_half() -> None:
    """Twelve maps, half of them above and half below the mean of three images; the means are 3.9 or 4.1 deviations from 0."""
    sign = torch.tensor([1.0, -1.0]).repeat(6)[:, None]
    exact = torch.tensor([1.0, 1.0, -1.0]) + sign * torch.tensor([1 / 3.9, 1 / 4.1, 1 / 4.1])
    first_order = exact - 0.1 - 0.01 * sign  # too low by 0.1, and off by 0.01 either way
    scorer: Any = Told(exact)
    taylor: Any = Namespace(margins=lambda ids, _: first_order[ids])
    _, (found,) = calibrate(scorer, taylor, torch.ones(12, dtype=torch.bool))
    assert found.undecided.tolist() == [True, False, False] and found.decided_correct == 1
    torch.testing.assert_close(found.bias, torch.full((3,), 0.1))
    torch.testing.assert_close(found.tolerance, torch.full((3,), 0.045), rtol=1e-3, atol=0)


def test_what_all_layers_say_of_an_image_raises_the_deviation_of_each() -> None:
    scale, oddity = _pooled(torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 6.0]]))
    torch.testing.assert_close(oddity, torch.tensor([1.0, 1.0, 5**0.5]))
    torch.testing.assert_close(scale, torch.tensor([[1.0, 1.0, 5**0.5], [2.0, 2.0, 6.0]]))
