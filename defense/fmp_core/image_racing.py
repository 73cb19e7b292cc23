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
CONFIDENCE = 5.0  # standard deviations over the pilots that an image's margin keeps from 0: 1 - 3e-7, if normal
PARTS = 16  # the images are taken in about so many parts
FEWEST = 2  # images in a part


class Score(Protocol):
    """Scores the maps of a bool mask ``[N]`` on the images at ``which`` (:func:`~fmp_core.ranking.score_feature_maps`)."""

    def __call__(self, wanted: Tensor, which: Tensor | None, watch: Callable[[Tensor, Tensor, int], None] | None) -> Scores: ...


def count_with_few_images(score: Score, layers: Sequence[ConvLayer], images: int, p: int, scope: str) -> Scores:
    """Scores in which the maps at and below the cut of each group are scored on all ``images``.

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
    ranks.combine(margins)
    mean = torch.stack([margins[where][pilots[where]].mean(0) for _, where in slices(layers)])
    spread = torch.stack([margins[where][pilots[where]].std(0, correction=0) for _, where in slices(layers)])
    contested = mean.abs() < CONFIDENCE * spread
    order = contested.sum(0).argsort(descending=True, stable=True)  # so that few parts hold what layers need
    parts = order.split(max(FEWEST, -(-images // PARTS)))
    # which layers need which part, and what the parts a layer does not need add to its counts
    needed = torch.stack([contested[:, part].any(1) for part in parts])
    foretold = torch.stack([(mean[:, part] > 0).sum(1) for part in parts]).masked_fill(needed, 0).sum(0)
    widths = torch.tensor([layer.channels for layer in layers])
    needed, foretold = needed.repeat_interleave(widths, 1), foretold.repeat_interleave(widths)

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

    add(lambda number: ~pilots & needed[number])
    foreseen = torch.where(pilots, correct, correct + foretold)
    full = pilots | needed.all(0)
    counts = Scores(tuple(layers), foreseen, torch.zeros(total, dtype=torch.float64), slimmest, logits, images)
    for members in ordered_groups(counts, scope):
        count = len(members) // p
        if count:
            full[members[foreseen[members] <= foreseen[members[count - 1]]]] = True
    add(lambda number: full & ~pilots & ~needed[number])
    margin[~full] = torch.inf
    return Scores(tuple(layers), torch.where(full, correct, foreseen), margin / images, slimmest, logits / images, images)
