"""What is pruned of a ranking: the same share of every layer, as many as a budget of accuracy allows."""

from __future__ import annotations

import pytest
import torch
from fmp_core.models.feature_maps import ConvLayer
from fmp_core.selection.choice import in_equal_shares, most_within_budget, shuffled_in_each_layer
from torch import nn

LAYERS = (ConvLayer("a", nn.Conv2d(1, 64, 1)), ConvLayer("b", nn.Conv2d(1, 128, 1)))


def test_in_equal_shares_takes_the_same_share_of_every_layer():
    change = torch.rand(192, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    change[64:] *= 1000  # layers have scales of their own
    first = in_equal_shares(change, LAYERS)[:30]
    assert set(first[first < 64].tolist()) == set(change[:64].topk(10).indices.tolist())
    assert set(first[first >= 64].tolist()) == set((change[64:].topk(20).indices + 64).tolist())


@pytest.mark.parametrize(("budget", "expected"), [(0.1, 10), (0.0, 0), (0.055, 5), (0.07, 7)])
def test_pruning_goes_as_far_as_the_budget(budget: float, expected: int):
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    chosen = most_within_budget(order, budget, lambda mask: 0.9 - 0.01 * int(mask.sum()))
    assert set(chosen.nonzero().flatten().tolist()) == set(order[:expected].tolist())


def test_no_more_than_a_quarter_of_all_maps_is_pruned():
    """However little accuracy it costs."""
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    chosen = most_within_budget(order, 1.0, lambda mask: 0.9)
    assert 99 <= int(chosen.sum()) <= 100
    assert chosen[order[:99]].all()


def test_of_maps_that_a_trigger_changes_alike_the_first_come_first():
    """Maps that are always zero, of which trained networks have some, all change by 0."""
    order = in_equal_shares(torch.zeros(192, dtype=torch.float64), LAYERS)
    assert order[order < 64].tolist() == list(range(64))
    assert order[order >= 64].tolist() == list(range(64, 192))


def test_a_random_control_has_as_many_maps_of_each_layer_and_depends_on_its_seed_alone():
    mask = torch.zeros(192, dtype=torch.bool)
    mask[:5] = mask[64:74] = True
    drawn, again, other = (shuffled_in_each_layer(mask, LAYERS, seed) for seed in (1, 1, 2))
    assert (drawn[:64].sum(), drawn[64:].sum()) == (5, 10)
    assert drawn.equal(again)
    assert not drawn.equal(other)
    assert not drawn.equal(mask)


def test_a_small_layer_does_not_come_first() -> None:
    """Half a map of four is an eighth of its layer: sixteen of 128 come before."""
    layers = (ConvLayer("a", nn.Conv2d(1, 4, 1)), ConvLayer("b", nn.Conv2d(1, 128, 1)))
    assert in_equal_shares(torch.rand(132, generator=torch.Generator().manual_seed(0)), layers)[:16].min() >= 4
