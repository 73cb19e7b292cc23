"""One call of :class:`fmp_core.frg.scorer.FeatureMapScorer`, its options by keyword."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fmp_core.frg.reverse import FrgSettings
from fmp_core.frg.scorer import Batching, FeatureMapScorer
from fmp_core.frg.scores import Scores
from fmp_core.models.feature_maps import ConvLayer
from torch import Tensor, nn


def make_scorer(
    model: nn.Module,
    layers: Sequence[ConvLayer],
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 1,
    alpha: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    rows: int | None = None,
    progress: Callable[[int], None] = lambda pairs: None,
) -> FeatureMapScorer:
    settings = FrgSettings(eps, steps, alpha, seed)
    return FeatureMapScorer(model, layers, images, labels, settings, dtype, Batching(rows), progress)


def score_feature_maps(*of: Any, maps: Tensor | None = None, checkpoint: Any = None, **options: Any) -> Scores:
    return make_scorer(*of, **options).score(maps, checkpoint=checkpoint)
