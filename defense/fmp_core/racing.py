"""Racing over precision: all maps have bfloat16 scores, and only those that may end among the lowest N/p get float32 ones.

bfloat16 scores are the float32 ones plus a small error, whose size the rescored maps show. Racing over images comes before
(:mod:`.image_racing`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .ranking import Scores, ordered_groups

CONTENDERS = 2  # times the maps to choose are rescored at first
CONFIDENCE = 4.0  # standard deviations of the bfloat16 error that a dropped map keeps from the cut: 1 - 3e-5, if normal


def race(cheap: Scores, score: Callable[[Tensor], Scores], p: int, scope: str) -> Scores:
    """Scores whose lowest N/p maps are float32 scores; ``settled`` marks all maps that have one.

    A map is dropped if its bfloat16 score stays above the float32 score at the cut by more than bfloat16 has been seen to err,
    :data:`CONFIDENCE` standard deviations: in the mean margin, and, for its count, in the slimmest margin of a correct image.

    Args:
        cheap: bfloat16 scores of all maps; an infinite margin is not known.
        score: scores the maps of a bool mask ``[N]`` in float32.
    """
    total = cheap.total
    settled = torch.zeros(total, dtype=torch.bool)
    correct, margin = cheap.correct.clone(), cheap.margin.clone()
    doubtful = torch.zeros(total, dtype=torch.bool)
    for members in ordered_groups(cheap, scope):
        doubtful[members[: CONTENDERS * (len(members) // p)]] = True
    while doubtful.any():
        exact = score(doubtful)
        correct[doubtful], margin[doubtful] = exact.correct[doubtful], exact.margin[doubtful]
        settled |= doubtful
        scores = replace(cheap, correct=correct, margin=margin, settled=settled)
        doubtful = _in_doubt(cheap, scores, p, scope)
    return replace(cheap, correct=correct, margin=margin, settled=settled)


def _in_doubt(cheap: Scores, scores: Scores, p: int, scope: str) -> Tensor:
    """Dropped maps that the bfloat16 error seen so far could carry below the cut of their group; bool ``[N]``."""
    assert scores.settled is not None
    doubtful = torch.zeros(scores.total, dtype=torch.bool)
    known = torch.isfinite(cheap.margin)
    wrong = (scores.margin - cheap.margin)[scores.settled & known]
    slack = CONFIDENCE * float(wrong.square().mean().sqrt())
    fragile = cheap.slimmest < slack * cheap.samples**0.5  # one image errs more than the mean of all
    for members in ordered_groups(scores, scope):
        count = len(members) // p
        if count == 0:
            continue
        cut = members[count - 1]
        others = members[~scores.settled[members]]
        least = cheap.correct[others] - fragile[others].long()
        close = (least == scores.correct[cut]) & ~(known[others] & (cheap.margin[others] - slack > scores.margin[cut]))
        doubtful[others] = (least < scores.correct[cut]) | close
    return doubtful
