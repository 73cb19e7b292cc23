"""Racing over images: what an image cannot tell about a map's count is not computed.

At eps = 1/255 a feature map turns only few images: those whose margin is slim already. A few maps of each layer, the pilots,
are scored on all images and show which images those are. The other maps are scored on them; the rest of the images counts as
the pilots have it, which settles a map's count. Only maps whose count ties at the cut or lies below it need all images, for
the mean margin that decides there (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from . import ranks
from .feature_maps import ConvLayer
from .ranking import Scores, ordered_groups, slices

PILOTS = 32  # maps per layer
CONFIDENCE = (
    4.0  # standard deviations over the pilots that an image's margin keeps from 0, to count as theirs: 1 - 3e-5, if normal
)
PARTS = 8  # the images are taken in about so many parts
FEWEST = 4  # images in a part
CONTENDERS = 2  # times the maps to choose get all images, as many as are rescored in float32 (:mod:`.racing`)


class Score(Protocol):
    """Scores the maps of a bool mask ``[N]`` on the images at ``which`` (:func:`~fmp_core.ranking.score_feature_maps`)."""

    def __call__(self, wanted: Tensor, which: Tensor | None, watch: Callable[[Tensor, Tensor, int], None] | None) -> Scores: ...


def count_with_few_images(score: Score, layers: Sequence[ConvLayer], images: int, p: int, scope: str) -> Scores:
    """Scores in which the lowest N/p maps of each group, and as many again, are scored on all ``images``.

    The others have an infinite ``margin``, and the ``correct`` that all images would give with the confidence above.
    """
    total = sum(layer.channels for layer in layers)
    pilots = torch.zeros(total, dtype=torch.bool)
    for layer, where in slices(layers):
        pilots[torch.linspace(where.start, where.stop - 1, min(PILOTS, layer.channels)).round().long()] = True
    margins = torch.zeros(total, images)

    def keep(where: Tensor, found: Tensor, first: int) -> None:
        margins[where.cpu(), first : first + found.shape[1]] = found.float().cpu()

    whole = score(pilots, None, keep)
    ranks.combine(margins, least=torch.zeros(()))
    mean = torch.stack([margins[where][pilots[where]].mean(0) for _, where in slices(layers)])
    spread = torch.stack([margins[where][pilots[where]].std(0, correction=0) for _, where in slices(layers)])
    contested = mean.abs() < CONFIDENCE * spread
    order = contested.sum(0).argsort(descending=True, stable=True)  # so that few parts hold what a layer needs
    parts = order.split(max(FEWEST, -(-images // PARTS)))
    # of each layer: the number of parts up to its last contested image, and the count of what lies behind them
    needed = torch.stack([contested[:, part].any(1) * (number + 1) for number, part in enumerate(parts)]).amax(0)
    behind = torch.stack([(mean[:, part] > 0).sum(1) * (needed <= number) for number, part in enumerate(parts)]).sum(0)
    widths = torch.tensor([layer.channels for layer in layers])
    needed, behind = needed.repeat_interleave(widths), behind.repeat_interleave(widths)

    correct, margin = whole.correct.clone(), whole.margin * images
    slimmest, logits = whole.slimmest.clone(), whole.logits * images

    def add(wanted: Callable[[int], Tensor]) -> None:
        for number, part in enumerate(parts):
            chosen = wanted(number)
            if not chosen.any():
                continue
            found = score(chosen, part, None)
            correct[chosen] += found.correct[chosen]
            margin[chosen] += found.margin[chosen] * len(part)
            logits[chosen] += found.logits[chosen] * len(part)
            slimmest[chosen] = torch.minimum(slimmest[chosen], found.slimmest[chosen])

    slimmest[~pilots] = torch.inf
    add(lambda number: ~pilots & (needed > number))
    foreseen = torch.where(pilots, correct, correct + behind)
    full = pilots | (needed == len(parts))
    counts = Scores(tuple(layers), foreseen, torch.zeros(total, dtype=torch.float64), slimmest, logits, images)
    for members in ordered_groups(counts, scope):
        count = CONTENDERS * (len(members) // p)
        if count:
            full[members[foreseen[members] <= foreseen[members[count - 1]]]] = True
    add(lambda number: full & ~pilots & (needed <= number))
    margin[~full] = torch.inf
    return Scores(tuple(layers), torch.where(full, correct, foreseen), margin / images, slimmest, logits / images, images)
