"""Racing: only maps that may end among the lowest N/p are scored in full.

Scores of a cheaper kind are the full ones plus a small error. ``--ranking racing`` races twice: foretold scores
(:mod:`~fmp_core.frg.image_racing`) against bfloat16 ones, and these against float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fmp_core.frg.scorer import Scores, ordered_groups

CONTENDERS = 2  # times the maps to choose are rescored at first
CONFIDENCE = 4.0  # standard deviations of the cheap margin's error that a dropped map keeps from the cut: 1 - 3e-5, if normal


def race(cheap: Scores, score: Callable[[Tensor], Scores], p: int, scope: str, error: Tensor | None = None) -> Scores:
    """Scores whose lowest N/p maps are full scores; ``settled`` marks all maps that have one.

    A map is dropped if its cheap score stays above the full score at the cut by more than cheap scores err, :data:`CONFIDENCE`
    standard deviations: in the mean margin, and, for its count, in the smallest_margin margin of a correct image.

    Args:
        cheap: scores of all maps; where they are not ``settled``, ``margin`` is the least it may be.
        score: scores the maps of a bool mask ``[N]`` in full.
        error: standard deviations of the cheap margins' errors, float64 ``[N]``, from maps chosen by chance; the counts are
            those of ``score`` then. Without it the rescored maps show how far all err.
    """
    settled = torch.zeros(cheap.total, dtype=torch.bool)
    known = ~settled if cheap.settled is None else cheap.settled
    correct, margin, smallest_margin, floor = (
        cheap.correct.clone(),
        cheap.margin.clone(),
        cheap.smallest_margin.clone(),
        cheap.margin,
    )
    doubtful = torch.zeros(cheap.total, dtype=torch.bool)
    for members in ordered_groups(cheap, scope):
        doubtful[members[: CONTENDERS * (len(members) // p)]] = True
    while doubtful.any():
        full = score(doubtful)
        for own, found in ((correct, full.correct), (margin, full.margin), (smallest_margin, full.smallest_margin)):
            own[doubtful] = found[doubtful]
        settled |= doubtful
        if error is None:
            wrong = (margin - cheap.margin)[settled & known]
            slack = torch.full_like(margin, CONFIDENCE * float(wrong.square().mean().sqrt()))
            fragile = cheap.smallest_margin < slack * cheap.samples**0.5  # one image errs more than the mean of all
        else:
            slack, fragile = CONFIDENCE * error, torch.zeros_like(settled)
        floor = torch.where(known, cheap.margin - slack, cheap.margin)
        scores = replace(cheap, correct=correct, margin=margin, settled=settled)
        doubtful = _in_doubt(scores, cheap.correct - fragile.long(), floor, p, scope)
    margin = torch.where(settled, margin, floor)
    return replace(cheap, correct=correct, margin=margin, smallest_margin=smallest_margin, settled=settled)


def _in_doubt(scores: Scores, least: Tensor, floor: Tensor, p: int, scope: str) -> Tensor:
    """Dropped maps that would end below the cut of their group with the ``least`` count and margin they may have."""
    doubtful = torch.zeros(scores.total, dtype=torch.bool)
    assert scores.settled is not None
    for members in ordered_groups(scores, scope):
        count = len(members) // p
        if count == 0:
            continue
        cut = members[count - 1]
        others = members[~scores.settled[members]]
        close = (least[others] == scores.correct[cut]) & (floor[others] <= scores.margin[cut])
        doubtful[others] = (least[others] < scores.correct[cut]) | close
    return doubtful
