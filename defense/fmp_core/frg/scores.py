"""Scores of feature maps, and the cut: the N/p lowest of them (paper, Algorithm 1, lines 8-13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fmp_core.models.feature_maps import ConvLayer


class Counts(NamedTuple):
    """Sums over FRG images for each of N maps.

    ``correct`` int64 ``[N]``: images classified correctly. ``margin`` float64 ``[N]``: sum of (logit of the true class -
    largest other logit). ``smallest_margin`` float64 ``[N]``: the smallest margin of a correct image, inf if there is none.
    """

    correct: Tensor
    margin: Tensor
    smallest_margin: Tensor

    @staticmethod
    def empty(total: int, device: torch.device) -> Counts:
        """Of ``total`` maps on no images."""
        return Counts(
            torch.zeros(total, dtype=torch.int64, device=device),
            torch.zeros(total, dtype=torch.float64, device=device),
            torch.full((total,), torch.inf, dtype=torch.float64, device=device),
        )

    @staticmethod
    def over_images(margins: Tensor, correct: Tensor) -> Counts:
        """From the margins ``[N, B]`` of B images, and which of them are classified correctly, bool ``[N, B]``."""
        smallest = torch.where(correct, margins, torch.inf).double().amin(1)
        return Counts(correct.sum(1), margins.sum(1, dtype=torch.float64), smallest)

    def put(self, map_ids: Tensor, counts: Counts) -> None:
        """Replace what is known of the maps at ``map_ids`` ``[n]``, in place."""
        for own, theirs in zip(self, counts, strict=True):
            own[map_ids] = theirs

    def plus(self, other: Counts) -> Counts:
        """On the images of both."""
        smallest = torch.minimum(self.smallest_margin, other.smallest_margin)
        return Counts(self.correct + other.correct, self.margin + other.margin, smallest)

    def cpu(self) -> Counts:
        return Counts(*(tensor.cpu() for tensor in self))

    def scores(self, layers: Sequence[ConvLayer], samples: int) -> Scores:
        """On ``samples`` images."""
        correct, margin, smallest = self.cpu()
        return Scores(tuple(layers), correct, margin / samples, smallest, samples)


def margins_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Margins ``[...]`` of the true class over the largest other, and whether it wins (bool; the first of equal logits does).

    ``logits`` ``[..., K]``; ``labels`` int64, broadcast to ``[...]``.
    """
    labels = labels.expand(logits.shape[:-1])[..., None]
    margins = logits.gather(-1, labels)[..., 0] - logits.scatter(-1, labels, -torch.inf).amax(-1)
    return margins, logits.argmax(-1) == labels[..., 0]


@dataclass(frozen=True)
class Scores:
    """FRG scores of all N feature maps, layers in execution order, channels within them.

    ``correct`` int64 ``[N]``: how many of ``samples`` FRG images the whole model still classifies correctly.
    ``margin`` float64 ``[N]``: mean over the images of (logit of the true class - largest other logit).
    ``smallest_margin`` float64 ``[N]``: the smallest margin among the images classified correctly (inf if there are none).
    ``settled`` bool ``[N]``: False for maps that racing dropped, whose ``margin`` is only the least it may be (-inf: not
    known); None if there are none.
    """

    layers: tuple[ConvLayer, ...]
    correct: Tensor
    margin: Tensor
    smallest_margin: Tensor
    samples: int
    settled: Tensor | None = None

    @property
    def total(self) -> int:
        return len(self.correct)

    def order(self) -> Tensor:
        """Positions, int64 ``[N]``, from the lowest score up; ties of ``correct`` by ``margin``, then by position.

        Maps that racing dropped come after all others.
        """
        dropped = torch.zeros(self.total) if self.settled is None else ~self.settled
        return torch.from_numpy(np.lexsort((self.margin.numpy(), self.correct.numpy(), dropped.numpy())))  # last key first


@dataclass(frozen=True)
class Cut:
    """The cut through one comparison group: the first ``count`` of ``order`` (positions, lowest score first) lie below it."""

    order: Tensor
    count: int

    @property
    def last(self) -> Tensor:
        """Position of the highest map below the cut; there must be one."""
        return self.order[self.count - 1]

    def tied(self, correct: Tensor) -> Tensor:
        """Positions of the maps whose ``correct``, int64 ``[N]``, equals that of both sides of the cut; none if they differ."""
        if not 0 < self.count < len(self.order) or correct[self.last] != correct[self.order[self.count]]:
            return self.order[:0]
        return self.order[correct[self.order] == correct[self.last]]


def layer_slices(layers: Sequence[ConvLayer]) -> list[tuple[ConvLayer, slice]]:
    """Each layer with the positions of its maps among the maps of all layers."""
    pairs, start = [], 0
    for layer in layers:
        pairs.append((layer, slice(start, start + layer.channels)))
        start += layer.channels
    return pairs


def comparison_groups(layers: Sequence[ConvLayer], scope: str) -> list[slice]:
    """The positions of the maps that are compared with each other: all maps (``global``, the paper), or each layer's
    (``layer``, the released code)."""
    positions = [part for _, part in layer_slices(layers)]
    return [slice(0, positions[-1].stop)] if scope == "global" else positions


def cuts(scores: Scores, p: int, scope: str) -> list[Cut]:
    """The cut of each comparison group: N/p of its N maps, rounded down."""
    order = scores.order()
    groups = [order[(order >= group.start) & (order < group.stop)] for group in comparison_groups(scores.layers, scope)]
    return [Cut(members, len(members) // p) for members in groups]


def lowest(scores: Scores, p: int, scope: str) -> tuple[Tensor, Tensor]:
    """The maps below the cuts, and the maps with the ``correct`` of a cut that goes through their midst; both bool ``[N]``."""
    mask, tied = torch.zeros(2, scores.total, dtype=torch.bool)
    for cut in cuts(scores, p, scope):
        mask[cut.order[: cut.count]] = True
        tied[cut.tied(scores.correct)] = True
    return mask, tied
