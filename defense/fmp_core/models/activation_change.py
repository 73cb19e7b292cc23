"""Trigger activation change (TAC): how much the trigger changes each feature map's activation, and whether a selection found
the most changed maps.

TAC needs poisoned images beside their clean counterparts, which no defender has: reports and ablations may use it, the
defense may not. After Zheng et al., "Data-free backdoor removal based on channel Lipschitzness" (ECCV 2022), with the mean
absolute difference in place of the L2 norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fmp_core.models.feature_maps import ConvLayer, frozen
from fmp_core.system.devices import by_batch, rows_per_batch


def trigger_activation_change(model: nn.Module, layers: Sequence[ConvLayer], clean: Tensor, poisoned: Tensor) -> Tensor:
    """Mean over images and positions of |map on the poisoned image - on its clean counterpart|, float64 ``[N_maps]``, CPU.

    Maps are ordered by layer, as given, then by channel. ``model`` takes pixels in [0,1] and is left as it was found.
    ``clean`` and ``poisoned`` are float ``[N, C, H, W]`` in [0,1] on its device; row ``i`` of both shows the same image. Raises
    ValueError if the two differ in shape, or there are no images.
    """
    if clean.shape != poisoned.shape or not len(clean):
        raise ValueError(f"clean images {tuple(clean.shape)} and poisoned ones {tuple(poisoned.shape)} are no pairs")
    sums = [torch.zeros(layer.channels, dtype=torch.float64, device=clean.device) for layer in layers]

    def work(part: slice) -> Tensor:
        for total in sums:
            total.zero_()
        model(torch.cat([clean[part], poisoned[part]]).contiguous(memory_format=torch.channels_last))
        return torch.cat(sums)

    with ExitStack() as hooks, frozen(model), torch.inference_mode():
        for layer, total in zip(layers, sums, strict=True):

            def add(_module: nn.Module, _inputs: object, out: Tensor, total: Tensor = total) -> None:
                before, after = out.chunk(2)
                total += (after - before).abs().mean((2, 3), dtype=torch.float64).sum(0)

            hooks.enter_context(layer.module.register_forward_hook(add))
        changes = by_batch(len(clean), max(1, rows_per_batch(clean.device) // 2), clean.device, work)
    return torch.stack(changes).sum(0).cpu() / len(clean)


class Precision(NamedTuple):
    """How many of the chosen maps are among those whose activation the trigger changes most.

    ``hits`` of ``chosen`` maps are among the k maps of highest TAC in their layer, k being the number chosen there.
    ``random`` is the precision a random choice of the same sizes has on average; ``chance`` is the probability that such a
    choice hits at least as often. ``percentile`` is the chosen maps' mean TAC percentile within their layers: 0.5 for a random
    choice, near 1 where the most changed maps were chosen. All but the counts are NaN if nothing is chosen.
    """

    hits: int
    chosen: int
    random: float
    chance: float
    percentile: float

    @property
    def value(self) -> float:
        """The precision, in [0,1]."""
        return self.hits / self.chosen if self.chosen else math.nan


def precision_at(chosen: Tensor, tac: Tensor, layers: Sequence[ConvLayer]) -> Precision:
    """Compare a selection with TAC, layer by layer (TAC has no common scale across layers).

    ``chosen`` is bool ``[N_maps]``; ``tac`` ``[N_maps]`` is from :func:`trigger_activation_change`, equal values count by
    position; both are ordered by ``layers``.
    """
    hits, expected, percentiles, start = 0, 0.0, 0.0, 0
    distribution = np.ones(1)  # of the hits of a random choice, layer after layer
    for layer in layers:
        n, inside, changes = layer.channels, chosen[start:][: layer.channels], tac[start:][: layer.channels]
        start += n
        k = int(inside.sum())
        order = changes.argsort(descending=True, stable=True)
        hits += int(inside[order[:k]].sum())
        expected += k * k / n
        places = torch.empty(n, dtype=torch.float64)
        places[order] = torch.arange(n, 0, -1, dtype=torch.float64)
        percentiles += float(((places[inside] - 0.5) / n).sum())
        distribution = np.convolve(distribution, _hypergeometric(k, n))
    total = int(chosen.sum())
    if not total:
        return Precision(0, 0, math.nan, math.nan, math.nan)
    return Precision(hits, total, expected / total, min(1.0, float(distribution[hits:].sum())), percentiles / total)


def _hypergeometric(k: int, n: int) -> np.ndarray:
    """Probabilities that 0..k of ``k`` maps drawn from ``n`` are among ``k`` given ones."""
    return np.array([math.comb(k, h) * math.comb(n - k, k - h) / math.comb(n, k) for h in range(k + 1)])
