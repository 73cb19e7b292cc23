"""The paper's "Initialization" (section 3.3): chosen feature maps are set to zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fmp_core.models.evaluate import predict
from fmp_core.models.feature_maps import ConvLayer


def prune_feature_maps(layers: Sequence[ConvLayer], chosen: Mapping[str, Tensor]) -> None:
    """Zero, in place, the filter and bias of every chosen map, and weight and bias of its own batch norms (of one without
    these: its running mean).

    ``chosen`` maps a layer name to a bool tensor ``[channels]``. Afterwards the channel's output, and that of its batch norm,
    is exactly 0. A batch norm fed by anything else (a residual sum) is left alone.
    """
    set_to_zero(parts_of(layers, chosen))


def parts_of(layers: Sequence[ConvLayer], chosen: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The tensors that :func:`prune_feature_maps` changes, each with a bool mask on its device that broadcasts to it: made
    once, since a GPU's host waits for each copy."""
    parts = [(values, chosen[layer.name].to(values.device)) for layer in layers for values in _values_of_maps(layer)]
    return [(values, mask.view(-1, *[1] * (values.dim() - 1))) for values, mask in parts]


@torch.no_grad()
def set_to_zero(parts: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Zero, in place, what :func:`parts_of` found."""
    for values, mask in parts:
        values.masked_fill_(mask, 0)


def _values_of_maps(layer: ConvLayer) -> list[Tensor]:
    """The tensors whose first dimension is the layer's maps, and which make a map and what its batch norms make of it."""
    modules = (layer.module, *layer.batch_norms)
    plain = [module.running_mean for module in layer.batch_norms if module.weight is None]
    values = [*(part for module in modules for part in (module.weight, module.bias)), *plain]
    return [part for part in values if isinstance(part, Tensor)]


def accuracy_without(
    model: nn.Module, layers: Sequence[ConvLayer], chosen: Mapping[str, Tensor], images: Tensor, labels: Tensor
) -> float:
    """Accuracy in [0,1] on uint8 images with the chosen maps pruned; the model is left as it was found."""
    kept = [(values, values.detach().clone()) for layer in layers for values in _values_of_maps(layer)]
    try:
        prune_feature_maps(layers, chosen)
        return float((predict(model, images, labels, len(images))[0] == labels).double().mean())
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
