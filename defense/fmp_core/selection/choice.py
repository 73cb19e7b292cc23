"""The selection: the feature maps to prune, and what they were selected by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fmp_core.errors import UserError
from fmp_core.frg.scores import Scores, comparison_groups, layer_slices, lowest
from fmp_core.inversion.trigger import ALL_TO_ALL, InvertedTrigger
from fmp_core.inversion.verdict import Verdict
from fmp_core.models.feature_maps import ConvLayer


@dataclass(frozen=True)
class Selection:
    """The N feature maps of a model, layers in execution order: which to prune, and why.

    Args:
        mask: bool ``[N]``, the maps to prune.
        ties: maps whose count of correct images equals that of a cut they straddle; there the margin decided.
        scores: FRG's, if they were computed.
        verdict: on the model, if triggers were inverted.
        triggers: towards the target of a backdoored model, the one of the verdict first.
        activation_change: float64 ``[N]``, how far the first trigger changes each map, if that decided.
        selected_by: the command, or the caller's own function, that selected instead of FMP (ablations); None for FMP.
    """

    mask: Tensor
    ties: int = 0
    scores: Scores | None = None
    verdict: Verdict | None = None
    triggers: tuple[InvertedTrigger, ...] = ()
    activation_change: Tensor | None = None
    selected_by: str | None = None

    @property
    def pruned(self) -> int:
        return int(self.mask.sum())

    @property
    def target(self) -> int | None:
        """The class of the backdoor, if the verdict names a single one."""
        named = self.verdict.target if self.verdict and self.verdict.backdoored else ALL_TO_ALL
        return None if named == ALL_TO_ALL else named

    def by_layer(self, layers: Sequence[ConvLayer]) -> dict[str, Tensor]:
        """Layer name -> bool ``[channels]``."""
        return {layer.name: self.mask[positions] for layer, positions in layer_slices(layers)}


def check_selection(selection: Any, layers: Sequence[ConvLayer], select: Callable[..., Any]) -> Selection:
    """What ``select``, a caller's own function, returned; ``selected_by`` names it if it does not say.

    Raises UserError: no Selection, or one whose mask does not fit the layers.
    """
    name = f"{getattr(select, '__module__', '')}.{getattr(select, '__qualname__', type(select).__qualname__)}"
    count = sum(layer.channels for layer in layers)
    if not isinstance(selection, Selection):
        raise UserError(f"select: {name} returned a {type(selection).__name__}, but must return a Selection.")
    mask = selection.mask
    if not (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == (count,)):
        what = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise UserError(f"select: the mask of {name} is a {what}, but must be a torch.bool [{count}], one a feature map.")
    return replace(selection, selected_by=selection.selected_by or f"FMP(select={name})")


def select_lowest(scores: Scores, p: int, scope: str, verdict: Verdict | None = None) -> Selection:
    """The N/p maps with the lowest scores, of each layer or of all together (paper, Algorithm 1, lines 8-13)."""
    mask, tied = lowest(scores, p, scope)
    return Selection(mask, int(tied.sum()), scores, verdict)


def select_none(layers: Sequence[ConvLayer]) -> Selection:
    """No map: fine-tuning alone."""
    return Selection(torch.zeros(sum(layer.channels for layer in layers), dtype=torch.bool))


def select_at_random(layers: Sequence[ConvLayer], p: int, scope: str, seed: int) -> Selection:
    """As many maps as :func:`select_lowest`, drawn without a look at the model: the control of FMP's ranking."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(sum(layer.channels for layer in layers), dtype=torch.bool)
    for group in comparison_groups(layers, scope):
        size = group.stop - group.start
        mask[group.start + torch.randperm(size, generator=generator)[: size // p]] = True
    return Selection(mask)


def shuffled_in_each_layer(mask: Tensor, layers: Sequence[ConvLayer], seed: int) -> Tensor:
    """As many maps of each layer as ``mask`` (bool ``[N]``) has, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    parts = [mask[positions] for _, positions in layer_slices(layers)]
    return torch.cat([part[torch.randperm(len(part), generator=generator)] for part in parts])


def highest_in_each_layer(values: Tensor, layers: Sequence[ConvLayer], p: int) -> Tensor:
    """The N/p maps of each layer with the highest of ``values`` ``[N]``; bool ``[N]``."""
    mask = torch.zeros(len(values), dtype=torch.bool)
    for layer, positions in layer_slices(layers):
        mask[values[positions].topk(layer.channels // p).indices + positions.start] = True
    return mask


def in_equal_shares(values: Tensor, layers: Sequence[ConvLayer]) -> Tensor:
    """Positions of all maps, int64 ``[N]``, highest ``values`` first, any first part taking the same share of each layer."""
    share = torch.empty(len(values), dtype=torch.float64)
    for layer, positions in layer_slices(layers):
        order = values[positions].argsort(descending=True, stable=True) + positions.start
        share[order] = (torch.arange(layer.channels, dtype=torch.float64) + 0.5) / layer.channels
    return share.argsort(stable=True)


def most_within_budget(order: Tensor, budget: float, accuracy_without: Callable[[Tensor], float]) -> Tensor:
    """As many maps, first in ``order`` first, as cost at most ``budget`` of accuracy, but no more than a quarter of all; bool
    ``[N]``, found by bisection.

    Args:
        order: int64 ``[N]``, positions of all maps.
        budget: in [0,1].
        accuracy_without: accuracy in [0,1], on clean images, of the model without the maps of a bool mask ``[N]``.
    """

    def first(count: int) -> Tensor:
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[order[:count]] = True
        return mask

    floor = accuracy_without(first(0)) - budget - 1e-9  # a loss of exactly the budget is allowed, whatever rounding does
    within, beyond = 0, len(order) // 4  # a quarter of all maps is the most
    while beyond - within > max(1, len(order) // 1000):
        middle = (within + beyond) // 2
        if accuracy_without(first(middle)) >= floor:
            within = middle
        else:
            beyond = middle
    return first(within)
