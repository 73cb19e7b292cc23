"""Racing over images: a forward pass, or even an FRG image, is made only where it can tell something about a map's rank.

At eps = 1/255 a feature map turns only few images: those whose margin is slim already. A few maps of each layer, the pilots,
are scored on all images. They show which images' answers differ between maps of the layer, and how far first order
(:mod:`.margin_taylor`, around the mean FRG image of still fewer maps, the scouts) can be trusted. The other maps are scored on
those images only, most of them without a forward pass; the rest of the images counts as the pilots have it, which settles a
map's count. Maps whose count ties at the cut or lies below it get a foretold margin of all images (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fmp_core.frg.margin_taylor import MarginTaylor
from fmp_core.frg.scorer import Foretell, Scores, Watch, slices
from fmp_core.frg.scorer_state import Answers, Tally
from fmp_core.frg.scores import comparison_groups
from fmp_core.models.feature_maps import ConvLayer
from fmp_core.system import distributed

SCOUTS, PILOTS = 2, 12  # maps per layer
CONTESTED = 4.0  # standard deviations over the pilots within which 0 makes an image contested: all but 6e-5, if normal
TRUSTED = 4.5  # standard deviations of its error that a foretold margin keeps from 0 to be believed: all but 7e-6, if normal


class Score(Protocol):
    """Scores the maps of a bool mask ``[N]`` on the images at ``which`` (:func:`~fmp_core.frg.scorer.score_feature_maps`)."""

    def __call__(
        self, wanted: Tensor, which: Tensor | None = None, watch: Watch | None = None, foretell: Foretell | None = None
    ) -> Scores: ...


@dataclass(frozen=True)
class Outlook:
    """What a layer's pilots tell about its other maps, for each of M images.

    ``correct`` bool ``[M]``: how a map answers that is like the pilots. ``contested`` bool ``[M]``: maps may differ in that.
    ``bias`` float ``[M]``: by how much foretold margins are too low. ``doubt`` float ``[M]``: below it they are not trusted.
    ``error``: standard deviation of the mean margin over the images, if those are foretold that may be.
    """

    correct: Tensor
    contested: Tensor
    bias: Tensor
    doubt: Tensor
    error: float

    @staticmethod
    def of(seen: Sequence[Tensor], foretold: Sequence[Tensor]) -> list[Outlook]:
        """From the pilots' margins and what first order makes of them, for each layer ``[pilots, M]``."""
        mean = torch.stack([margins.mean(0) for margins in seen])
        bias = torch.stack([(margins - guess).mean(0) for margins, guess in zip(seen, foretold, strict=True)])
        wrong = [margins - guess - b for margins, guess, b in zip(seen, foretold, bias, strict=True)]
        spread, _ = _pooled(torch.stack([margins.std(0, correction=0) for margins in seen]))
        doubt, oddity = _pooled(torch.stack([part.square().mean(0).sqrt() for part in wrong]))
        contested, doubt = mean.abs() < CONTESTED * spread, TRUSTED * doubt * oddity.clamp_min(1)
        trusted = [(guess + b).abs() > limit for guess, b, limit in zip(foretold, bias, doubt, strict=True)]
        error = [(part * use).mean(1).square().mean().sqrt().item() for part, use in zip(wrong, trusted, strict=True)]
        return [Outlook(*row) for row in zip(mean > 0, contested, bias, doubt, error, strict=True)]

    def foretell(self, first_order: MarginTaylor, which: Tensor) -> Foretell:
        """For maps of the layer on the images at ``which``."""

        def margins(reverse: Tensor, first: int) -> tuple[Tensor, Tensor]:
            part = which[first : first + reverse.shape[1]]
            found = first_order.margins(reverse, part) + self.bias[part]
            return found, found.abs() > self.doubt[part]

        return margins


def mean_reverse(score: Score, layers: Sequence[ConvLayer], images: Tensor) -> Tensor:
    """The FRG images ``[M, C, H, W]`` of ``images``, mean over a few maps of each layer."""
    scouts = _evenly(layers, SCOUTS)
    total = torch.zeros_like(images, dtype=torch.float64)  # in which the order of the sum does not show
    leading = int(distributed.my_share(scouts).int().argmax())

    def add(where: Tensor, reverse: Tensor, logits: Tensor, first: int) -> None:
        if where[0] == leading:
            total[first:] = 0  # a batch begins, perhaps not for the first time
        total[first : first + reverse.shape[1]] += reverse.sum(0, dtype=torch.float64)

    score(scouts, watch=add)
    distributed.combine(total)
    return (total / scouts.sum()).float()


def foretell_scores(
    score: Score, first_order: MarginTaylor, layers: Sequence[ConvLayer], p: int, scope: str
) -> tuple[Scores, Tensor]:
    """Scores with the counts of all maps, and by how much their margins may err (standard deviations, float64 ``[N]``).

    ``settled`` are the maps whose margin is foretold: those at and below the cut of a group of ``scope``, and the pilots.
    """
    pilots = _evenly(layers, PILOTS)
    whole, outlooks = _look(score, first_order, layers, pilots)
    images, widths = whole.samples, torch.tensor([layer.channels for layer in layers])

    def told(wanted: Tensor, contested: bool) -> Tally:
        """Of the maps ``wanted``, on the images that are contested in their layer, or on the others."""
        tally = Tally.empty(len(wanted), wanted.device)
        for (_, where), outlook in zip(slices(layers), outlooks, strict=True):
            chosen, which = torch.zeros_like(wanted), (outlook.contested == contested).nonzero().flatten()
            chosen[where] = wanted[where]
            if chosen.any() and len(which):
                found = score(chosen, which.cpu(), foretell=outlook.foretell(first_order, which))
                tally = tally.plus(Tally(found.correct, found.margin * len(which), found.smallest_margin))
        return tally

    on_contested = told(~pilots, contested=True)
    likely = torch.tensor([int((outlook.correct & ~outlook.contested).sum()) for outlook in outlooks])
    counts = torch.where(pilots, whole.correct, on_contested.correct + likely.repeat_interleave(widths))
    low = pilots | _at_or_below_cut(counts, layers, p, scope)
    foretold = low & ~pilots
    tally = on_contested.plus(told(foretold, contested=False))
    correct = torch.where(foretold, tally.correct, counts)
    margin = torch.where(foretold, tally.margin / images, torch.where(pilots, whole.margin, -torch.inf))
    smallest_margin = torch.where(pilots, whole.smallest_margin, tally.smallest_margin)
    error = torch.tensor([outlook.error for outlook in outlooks], dtype=torch.float64).repeat_interleave(widths)
    return Scores(tuple(layers), correct, margin, smallest_margin, images, settled=low), error


def _at_or_below_cut(counts: Tensor, layers: Sequence[ConvLayer], p: int, scope: str) -> Tensor:
    """The maps whose count is that of the last of the lowest N/p of their group, or lower; bool ``[N]``."""
    found = torch.zeros(len(counts), dtype=torch.bool)
    for group in comparison_groups(layers, scope):
        fewest = (group.stop - group.start) // p
        if fewest:
            found[group] = counts[group] <= counts[group].kthvalue(fewest).values
    return found


def _evenly(layers: Sequence[ConvLayer], count: int) -> Tensor:
    """``count`` maps of each layer, evenly spread; bool ``[N]``."""
    chosen = torch.zeros(sum(layer.channels for layer in layers), dtype=torch.bool)
    for layer, where in slices(layers):
        chosen[torch.linspace(where.start, where.stop - 1, min(count, layer.channels)).round().long()] = True
    return chosen


def _look(score: Score, first_order: MarginTaylor, layers: Sequence[ConvLayer], pilots: Tensor) -> tuple[Scores, list[Outlook]]:
    """The pilots' scores on all images, and what they tell about each layer."""
    images, device = len(first_order.images), first_order.images.device
    row = (pilots.cumsum(0) - 1).to(device)
    seen, foretold = torch.zeros(2, int(pilots.sum()), images, device=device)

    def keep(where: Tensor, reverse: Tensor, logits: Tensor, first: int) -> None:
        which = torch.arange(first, first + reverse.shape[1], device=device)
        seen[row[where][:, None], which] = Answers.of(logits, first_order.labels[which]).margins
        foretold[row[where][:, None], which] = first_order.margins(reverse, which)

    whole = score(pilots, watch=keep)
    distributed.combine(seen, foretold)
    rows = [row[where][pilots[where].to(device)] for _, where in slices(layers)]
    return whole, Outlook.of([seen[of] for of in rows], [foretold[of] for of in rows])


def _pooled(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviations ``[L, M]`` raised to what all L layers say of an image, and by how much it stands out, ``[M]``.

    A few pilots of one layer easily miss what turns an image; those of all layers do not (docs/performance.md).
    """
    usual = scale.median(1, keepdim=True).values.clamp_min(torch.finfo(scale.dtype).tiny)
    oddity = (scale / usual).square().mean(0).sqrt()
    return torch.maximum(scale, oddity * usual), oddity
