"""The paper's "Initialization" (section 3.3): chosen feature maps are set to zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fmp_core.models.evaluate import predict
from fmp_core.models.feature_maps import ConvLayer


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


def accuracy_without(
    model: nn.Module, layers: Sequence[ConvLayer], chosen: Mapping[str, Tensor], images: Tensor, labels: Tensor
) -> float:
    """Accuracy in [0,1] on uint8 images with the chosen maps pruned; the model is left as it was found."""
    modules = [module for layer in layers for module in (layer.module, *layer.batch_norms)]
    kept = [(p, p.detach().clone()) for module in modules for p in (module.weight, module.bias) if isinstance(p, Tensor)]
    try:
        prune_feature_maps(layers, chosen)
        return float((predict(model, images, labels, len(images))[0] == labels).double().mean())
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
