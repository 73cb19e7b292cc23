"""Scoring every feature map by FRG and choosing the lowest (paper, Algorithm 1, lines 1-13)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .compute import rows_per_batch
from .feature_maps import ConvLayer, frozen
from .frg import SharedForward, noisy_start


@dataclass(frozen=True)
class Scores:
    """FRG scores of all N feature maps, layers in execution order, channels within them.

    ``correct`` int64 ``[N]``: how many of ``samples`` FRG images the whole model still classifies correctly.
    ``margin`` float64 ``[N]``: mean over the images of (logit of the true class - largest other logit).
    """

    layers: tuple[ConvLayer, ...]
    correct: Tensor
    margin: Tensor
    samples: int

    @property
    def total(self) -> int:
        return len(self.correct)

    def slices(self) -> list[tuple[ConvLayer, slice]]:
        """Each layer with the positions of its maps."""
        found, start = [], 0
        for layer in self.layers:
            found.append((layer, slice(start, start + layer.channels)))
            start += layer.channels
        return found

    def order(self) -> Tensor:
        """Positions, int64 ``[N]``, from the lowest score up; ties of ``correct`` by ``margin``, then by position."""
        by_margin = torch.argsort(self.margin, stable=True)
        return by_margin[torch.argsort(self.correct[by_margin], stable=True)]


@dataclass(frozen=True)
class Choice:
    """The maps to prune: ``mask`` bool ``[N]``; ``ties`` counts maps whose ``correct`` equals that of a cut they straddle."""

    mask: Tensor
    ties: int

    def by_layer(self, scores: Scores) -> dict[str, Tensor]:
        return {layer.name: self.mask[where] for layer, where in scores.slices()}


def choose(scores: Scores, p: int, scope: str) -> Choice:
    """The lowest N/p maps (rounded down) of all maps together (``global``, the paper) or of each layer (``layer``, the
    released code)."""
    groups = [slice(0, scores.total)] if scope == "global" else [where for _, where in scores.slices()]
    mask = torch.zeros(scores.total, dtype=torch.bool)
    order = scores.order()
    ties = 0
    for group in groups:
        members = order[(order >= group.start) & (order < group.stop)]
        count = len(members) // p
        mask[members[:count]] = True
        if 0 < count < len(members) and scores.correct[members[count - 1]] == scores.correct[members[count]]:
            ties += int((scores.correct[members] == scores.correct[members[count]]).sum())
    return Choice(mask, ties)


def score_feature_maps(
    model: nn.Module,
    layers: Sequence[ConvLayer],
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 1,
    alpha: float | None = None,
    seed: int = 0,
    rows: int | None = None,
    progress: Callable[[int], None] = lambda maps: None,
) -> Scores:
    """Score all feature maps on all ``images``.

    Args:
        model: takes pixels in [0,1]; left as it was found (mode, gradient flags, hooks).
        layers: from :func:`~fmp_core.feature_maps.trace_conv_layers`.
        images: float ``[M, C, H, W]`` in [0,1], not augmented, on the model's device.
        labels: int64 ``[M]``.
        eps, steps, alpha: see :meth:`~fmp_core.frg.SharedForward.reversed_images`; alpha defaults to 2.5*eps/steps.
        seed: of the start noise, one draw per image, shared by all maps.
        rows: images per batch (memory bound); scores do not depend on it.
        progress: called with the number of (map, image) pairs just scored.
    """
    device = images.device
    rows = rows or rows_per_batch(device)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    start = noisy_start(images, noise.to(device), eps)
    alpha = 2.5 * eps / steps if alpha is None else alpha

    # Every batch has the same shape (short ones are filled up), because kernels are chosen by shape and round differently.
    batches = math.ceil(len(images) / rows)
    batch = math.ceil(len(images) / batches)
    copies = max(1, rows // batch)
    total = sum(layer.channels for layer in layers)
    correct = torch.zeros(total, dtype=torch.int64, device=device)
    margin = torch.zeros(total, dtype=torch.float64, device=device)
    with frozen(model):
        for first in range(0, len(images), batch):
            picked = torch.arange(first, first + batch, device=device).clamp(max=len(images) - 1)
            counted = min(batch, len(images) - first)
            shared = SharedForward(model, layers, images[picked], start[picked], copies)
            position = 0
            for layer in layers:
                for lead in range(0, layer.channels, copies):
                    channels = [min(lead + copy, layer.channels - 1) for copy in range(copies)]
                    reverse = shared.reversed_images(layer, channels, eps, steps, alpha)
                    with torch.inference_mode():
                        hits, margins = _judge(model(reverse), labels[picked].repeat(copies))
                    maps = min(copies, layer.channels - lead)
                    where = slice(position + lead, position + lead + maps)
                    correct[where] += hits.view(copies, batch)[:maps, :counted].sum(1)
                    margin[where] += margins.view(copies, batch)[:maps, :counted].sum(1, dtype=torch.float64)
                    progress(maps * counted)
                position += layer.channels
    return Scores(tuple(layers), correct.cpu(), margin.cpu() / len(images), len(images))


def _judge(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each row is classified correctly, and its true-class margin."""
    logits = logits.float()
    true = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return logits.argmax(1) == labels, true - others
