"""Counting what ranking launches on a GPU, without one: operations on tensors that have a shape but no data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fmp_core.frg.reverse import FrgSettings
from fmp_core.frg.scorer import Batching, FeatureMapScorer
from fmp_core.models.feature_maps import ConvLayer, frozen, trace_conv_layers
from fmp_core.settings import Settings
from fmp_core.system.devices import rows_per_batch

GPU_ROWS = rows_per_batch(torch.device("cuda"))  # images per batch
EPS = Settings().eps
RELEASED_BATCH = 32  # images per batch of the released code
NO_KERNEL = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::detach", "aten::lift_fresh"}

ReleasedScheme = Callable[[nn.Module, ConvLayer, int, Tensor, Tensor, Tensor], object]


class CountOperations(TorchDispatchMode):
    """While active, counts in ``count`` the operations that compute: a kernel launch each, or a few. Views do not count."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not func.is_view and func.name().split(".")[0] not in NO_KERNEL:
            self.count += 1
        return func(*args, **(kwargs or {}))


def operations_per_map(model: nn.Module, image: Tensor, images: int, released_scheme: ReleasedScheme) -> dict[str, float]:
    """Operations per feature map to rank all of them on ``images`` images: ``ours``, and the ``released`` scheme's.

    Shared forward passes are spread over all maps. ``released_scheme`` scores one map on one batch.

    Args:
        model: takes pixels in [0,1]; left as it was found.
        image: float ``[1, C, H, W]``, for its shape.
    """
    model = copy.deepcopy(model).to("meta")
    layers = trace_conv_layers(model, image.to("meta"))
    total = sum(layer.channels for layer in layers)
    pixels = torch.empty(images, *image.shape[1:], device="meta")
    labels = torch.empty(images, dtype=torch.int64, device="meta")
    with CountOperations() as ours:
        FeatureMapScorer(model, layers, pixels, labels, FrgSettings(EPS), batching=Batching(GPU_ROWS)).count()
    released = 0
    with frozen(model):
        for layer in layers:
            with CountOperations() as one:
                released_scheme(model, layer, 0, pixels[:RELEASED_BATCH], labels[:RELEASED_BATCH], pixels[:RELEASED_BATCH])
            released += one.count * layer.channels
    return {"ours": ours.count / total, "released": released * -(-images // RELEASED_BATCH) / total}
