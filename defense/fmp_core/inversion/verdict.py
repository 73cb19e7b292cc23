"""Is the model backdoored, towards which class, and by which feature maps? Not in the paper; no poisoned image is used.

For every class, a perturbation common to all clean images is reversed (:mod:`.trigger`). In a clean model what reaches
one class about reaches the others too; a backdoor is a class that is reached where no other is. The maps that the reversed
trigger moves most are the backdoor's (docs/strong.md has the figures behind the threshold).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fmp_core.frg.scorer import Choice, slices
from fmp_core.inversion.trigger import InvertedTrigger, invert_trigger, success
from fmp_core.models.activation_change import trigger_activation_change
from fmp_core.models.evaluate import to_unit
from fmp_core.models.fast_ops import to_precision
from fmp_core.models.feature_maps import ConvLayer, frozen
from fmp_core.system import distributed

LEAST_LEAD = 0.3  # of the class reached most over the next, in shares of the held-out images
LEAST_HELD_OUT = 50  # images below which a lead proves nothing: one of three is 33 points
HELD_OUT = 256  # clean images, the last ones, that triggers are not reversed on but tested (of a small subset, half)


@dataclass(frozen=True)
class Evidence:
    """What one family of perturbations says about a model.

    ``success`` float64 ``[K]``: share of the held-out images of other classes that a class's inverted trigger turns to it.
    ``held_out``: how many images that is, for the class that leaves fewest. ``lead``: how far the class reached most is ahead
    of the next.
    """

    family: str
    success: Tensor
    held_out: int

    @property
    def target(self) -> int:
        return int(self.success.argmax())

    @property
    def lead(self) -> float:
        best, next_best = self.success.topk(2).values.tolist()
        return float(best - next_best)

    @property
    def too_few(self) -> bool:
        """Too few held-out images to tell."""
        return self.held_out < LEAST_HELD_OUT

    @property
    def backdoored(self) -> bool:
        return self.lead >= LEAST_LEAD and not self.too_few

    def as_dict(self) -> dict[str, Any]:
        return {
            "backdoored": self.backdoored,
            "target": self.target,
            "family": self.family,
            "success": [round(share, 4) for share in self.success.tolist()],
            "lead": round(self.lead, 4),
            "held_out": self.held_out,
            "too_few": self.too_few,
        }


@dataclass(frozen=True)
class TriggerSearch:
    """Reverses triggers of a model from clean images: uint8 ``[M, C, H, W]``, ``labels`` int64 ``[M]``, on one device."""

    model: nn.Module
    layers: Sequence[ConvLayer]
    images: Tensor
    labels: Tensor
    dtype: torch.dtype
    seed: int

    def weigh(self, family: str, classes: int) -> Evidence:
        """The evidence of one family; under ``torchrun`` each process takes its share of the classes."""
        found = torch.zeros(classes, dtype=torch.float64, device=self.images.device)
        with frozen(self.model):
            network = self._network()
            for target in distributed.my_share(torch.ones(classes, dtype=torch.bool)).nonzero().flatten().tolist():
                seen, held_out = self._of_other_classes(target)
                if len(seen):
                    trigger = invert_trigger(network, self.dtype, seen, family, target, self.seed)
                    found[target] = success(network, self.dtype, trigger, held_out)
        distributed.combine(found)
        return Evidence(family, found.cpu(), self.held_out(classes))

    def held_out(self, classes: int) -> int:
        """Held-out images of other classes, for the class that leaves fewest."""
        labels = self.labels[self._cut :]
        return len(labels) - int(labels.bincount(minlength=classes).max())

    def triggers(self, families: Iterable[str], target: int) -> list[InvertedTrigger]:
        """A trigger of each family towards ``target``."""
        seen, _ = self._of_other_classes(target)
        with frozen(self.model):
            network = self._network()
            return [invert_trigger(network, self.dtype, seen, family, target, self.seed) for family in families]

    def moved(self, trigger: InvertedTrigger) -> Tensor:
        """How far the trigger moves each feature map on the held-out images, float64 ``[N]``
        (:func:`~fmp_core.models.activation_change.trigger_activation_change`)."""
        clean = to_unit(self.images[self._cut :]).contiguous(memory_format=torch.channels_last)
        return trigger_activation_change(self.model, self.layers, clean, trigger.on(clean))

    @property
    def _cut(self) -> int:
        return len(self.images) - min(HELD_OUT, len(self.images) // 2)

    def _of_other_classes(self, target: int) -> tuple[Tensor, Tensor]:
        """Images to reverse a trigger on, and held-out ones."""
        other = self.labels != target
        return self.images[: self._cut][other[: self._cut]], self.images[self._cut :][other[self._cut :]]

    def _network(self) -> nn.Module:
        return to_precision(self.model, self.layers[0].module, self.dtype)


def most_moved_first(moved: Tensor, layers: Sequence[ConvLayer]) -> Tensor:
    """Positions of all maps, int64 ``[N]``, so that any first part of them takes the same share of every layer."""
    place = torch.empty(len(moved), dtype=torch.float64)
    for layer, where in slices(layers):
        order = moved[where].argsort(descending=True, stable=True) + where.start
        place[order] = (torch.arange(layer.channels, dtype=torch.float64) + 0.5) / layer.channels
    return place.argsort(stable=True)


def choose_within_budget(order: Tensor, budget: float, accuracy: Callable[[Tensor], float]) -> Choice:
    """As many maps, first in ``order`` first, as cost at most ``budget`` of accuracy; found by bisection.

    Args:
        order: int64 ``[N]``, positions of all maps.
        budget: in [0,1].
        accuracy: of the model without the maps of a bool mask ``[N]``, on clean images, in [0,1].
    """

    def first(count: int) -> Tensor:
        mask = torch.zeros(len(order), dtype=torch.bool)
        mask[order[:count]] = True
        return mask

    floor = accuracy(first(0)) - budget - 1e-9  # a loss of just the budget is allowed, whatever floats make of it
    kept, lost = 0, len(order) // 4  # a quarter of all maps is never within reach
    while lost - kept > max(1, len(order) // 1000):
        middle = (kept + lost) // 2
        if accuracy(first(middle)) >= floor:
            kept = middle
        else:
            lost = middle
    return Choice(first(kept))
