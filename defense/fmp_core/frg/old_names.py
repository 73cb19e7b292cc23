"""Names that callers outside frg/ still use; goes as soon as they do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmp_core.frg.reverse import FrgSettings
from fmp_core.frg.scores import Scores, comparison_groups, layer_slices, lowest
from fmp_core.models.feature_maps import ConvLayer

slices = layer_slices


@dataclass(frozen=True)
class Choice:
    """The maps to prune."""

    mask: Tensor
    ties: int = 0
    moved: Tensor | None = None

    def by_layer(self, layers: Sequence[ConvLayer]) -> dict[str, Tensor]:
        return {layer.name: self.mask[where] for layer, where in layer_slices(layers)}


def choose(scores: Scores, p: int, scope: str) -> Choice:
    return Choice(*lowest(scores, p, scope))


def choose_by_chance(layers: Sequence[ConvLayer], p: int, scope: str, seed: int) -> Choice:
    generator = torch.Generator().manual_seed(seed)
    groups = comparison_groups(layers, scope)
    mask = torch.zeros(groups[-1].stop, dtype=torch.bool)
    for group in groups:
        size = group.stop - group.start
        mask[group.start + torch.randperm(size, generator=generator)[: size // p]] = True
    return Choice(mask)


def score_feature_maps(
    model: Any,
    layers: Any,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 1,
    alpha: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    rows: int | None = None,
    memory_mib: int | None = None,
    wanted: Tensor | None = None,
    progress: Any = lambda pairs: None,
    checkpoint: Any = None,
) -> Scores:
    from fmp_core.frg.scorer import Batching, FeatureMapScorer

    settings = FrgSettings(eps, steps, alpha, seed)
    scorer = FeatureMapScorer(model, layers, images, labels, settings, dtype, Batching(rows, memory_mib), progress)
    return scorer.score(wanted, None, checkpoint)
