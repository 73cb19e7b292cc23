"""The paper's "Initialization" (section 3.3): chosen feature maps are set to zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .feature_maps import ConvLayer


@torch.no_grad()
def prune_feature_maps(layers: Sequence[ConvLayer], chosen: Mapping[str, Tensor]) -> None:
    """Zero, in place, the filter and bias of every chosen map, and weight and bias of its own batch norms.

    ``chosen`` maps a layer name to a bool tensor ``[channels]``. Afterwards the channel's output, and that of its batch norm,
    is exactly 0. A batch norm fed by anything else (a residual sum) is left alone.
    """
    for layer in layers:
        mask = chosen[layer.name]
        for parameter in (p for module in (layer.module, *layer.batch_norms) for p in (module.weight, module.bias)):
            if isinstance(parameter, Tensor):
                parameter[mask.to(parameter.device)] = 0
