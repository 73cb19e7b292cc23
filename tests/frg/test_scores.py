"""The N/p lowest scores, and their ties."""

from __future__ import annotations

import pytest
import torch
from fmp_core.frg.scores import Counts, Scores, layer_slices, lowest, margins_of
from fmp_core.models.feature_maps import ConvLayer
from torch import nn


def made_up(correct: list[int], margin: list[float], channels: tuple[int, ...]) -> Scores:
    layers = tuple(ConvLayer(f"conv{i}", nn.Conv2d(1, count, 1)) for i, count in enumerate(channels))
    margins = torch.tensor(margin, dtype=torch.float64)
    return Scores(layers, torch.tensor(correct), margins, torch.ones(len(margin)), samples=10)


def test_global_takes_the_lowest_of_all_and_layer_the_lowest_of_each() -> None:
    #                  |------ conv0 -----|  |-- conv1 --|
    scores = made_up([5, 1, 2, 3, 9, 9, 8, 7], [0.0] * 8, (4, 4))
    assert lowest(scores, 4, "global")[0].nonzero().flatten().tolist() == [1, 2]
    assert lowest(scores, 4, "layer")[0].nonzero().flatten().tolist() == [1, 7]


@pytest.mark.parametrize(
    ("p", "of_all", "of_7", "of_3"), [(1, 10, 7, 3), (2, 5, 3, 1), (3, 3, 2, 1), (4, 2, 1, 0), (7, 1, 1, 0), (11, 0, 0, 0)]
)
def test_the_number_is_rounded_down(p: int, of_all: int, of_7: int, of_3: int) -> None:
    scores = made_up(list(range(10)), [0.0] * 10, (7, 3))
    assert int(lowest(scores, p, "global")[0].sum()) == of_all
    by_layer = lowest(scores, p, "layer")[0].split([7, 3])
    assert [int(mask.sum()) for mask in by_layer] == [of_7, of_3]


def test_a_layer_smaller_than_p_loses_nothing() -> None:
    scores = made_up([0, 0, 0] + [9] * 8, [0.0] * 11, (3, 8))
    assert lowest(scores, 8, "layer")[0].nonzero().flatten().tolist() == [3]


def test_ties_go_to_the_lower_margin_then_to_the_lower_index() -> None:
    scores = made_up([4, 4, 4, 4, 4, 9], [0.3, 0.1, 0.2, 0.1, 0.1, -9.0], (6,))
    assert scores.order().tolist() == [1, 3, 4, 2, 0, 5]
    assert lowest(scores, 2, "global")[0].nonzero().flatten().tolist() == [1, 3, 4]
    assert lowest(scores, 3, "layer")[0].nonzero().flatten().tolist() == [1, 3]


def test_ties_counts_the_maps_that_share_a_count_across_a_cut() -> None:
    scores = made_up([1, 4, 4, 4, 9, 9, 2, 3], [0.0] * 8, (6, 2))
    assert lowest(scores, 2, "layer")[1].sum() == 3  # conv0: 1 4 4 | 4 9 9, three 4s; conv1: 2 | 3, none
    assert lowest(scores, 8, "global")[1].sum() == 0  # 1 | 2
    assert lowest(scores, 2, "global")[1].sum() == 3  # 1 2 3 4 | 4 4 9 9
    assert lowest(scores, 1, "global")[1].sum() == 0  # all are taken: nothing was decided
    assert lowest(scores, 9, "global")[1].sum() == 0  # none is taken


def test_layer_slices_give_each_layer_its_maps() -> None:
    scores = made_up([0] * 9, [0.0] * 9, (2, 3, 4))
    assert [(layer.name, where) for layer, where in layer_slices(scores.layers)] == [
        ("conv0", slice(0, 2)),
        ("conv1", slice(2, 5)),
        ("conv2", slice(5, 9)),
    ]


def test_counts_are_sums_over_all_images_whichever_way_they_are_parted() -> None:
    # logits of one map for images of classes 0, 1, 0; the second map's first logits are equal: the first class wins
    logits = torch.tensor([[[3.0, 1.0], [0.0, 0.5], [1.0, 4.0]], [[2.0, 2.0], [2.0, 2.0], [1.0, 0.0]]])
    margins, correct = margins_of(logits, torch.tensor([0, 1, 0]))
    assert margins.tolist() == [[2.0, 0.5, -3.0], [0.0, 0.0, 1.0]]
    assert correct.tolist() == [[True, True, False], [True, False, True]]
    whole = Counts.over_images(margins, correct)
    assert [part.tolist() for part in whole] == [[2, 2], [-0.5, 1.0], [0.5, 0.0]]
    parts = Counts.over_images(margins[:, :1], correct[:, :1]).plus(Counts.over_images(margins[:, 1:], correct[:, 1:]))
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
    assert whole.scores((), 3).margin.tolist() == pytest.approx([-0.5 / 3, 1 / 3])
