"""Trigger inversion on a model: for every target in turn, the smallest common change that flips predictions to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fmp_core.data.clean_subset import HELD_OUT
from fmp_core.inversion.trigger import Batch, InvertedTrigger, flip_rate, invert_trigger, logits_of, targets_of
from fmp_core.inversion.verdict import Verdict
from fmp_core.models.activation_change import trigger_activation_change
from fmp_core.models.evaluate import to_unit
from fmp_core.models.fast_ops import to_precision
from fmp_core.models.feature_maps import ConvLayer, frozen
from fmp_core.system import distributed
from fmp_core.system.devices import exact_convolutions

FINALISTS = 8  # classes that get a whole trigger, if there are more than twice as many
QUICK_HELD_OUT = 64  # held-out images that a quick trigger is tested on
PROBABILITY_WEIGHT = 1e-6  # of a class's mean probability beside its flip rate: rates on so few images differ by more, or not


def inversions(num_classes: int) -> int:
    """How many triggers a verdict on so many classes takes, quick and whole ones, and the all-to-all one."""
    return num_classes + (FINALISTS if num_classes > 2 * FINALISTS else 0) + 1


@dataclass(frozen=True)
class TriggerSearch:
    """Inverts triggers of a model on clean images, and tests them on held-out ones.

    Args:
        model: takes pixels in [0,1]; left as it was found.
        layers: its convolutions in execution order.
        images: uint8 ``[M, C, H, W]``; labels: int64 ``[M]``; both on the model's device.
        dtype: precision of the inversion (:func:`~fmp_core.models.fast_ops.to_precision`).
        seed: draws the batches.
    """

    model: nn.Module
    layers: Sequence[ConvLayer]
    images: Tensor
    labels: Tensor
    dtype: torch.dtype
    seed: int

    def test(self, family: str, num_classes: int, progress: Callable[[], object] = lambda: None) -> Verdict:
        """Invert a trigger of ``family`` towards every class, and one all-to-all; processes of ``torchrun`` share them.

        Of many classes each gets a quick trigger first, and only the :data:`FINALISTS` whose triggers flip most a whole one, of
        equal ones those that make their class more probable: the others' flip rates stay those of the quick ones. ``progress``
        is called after each of :func:`inversions` triggers.
        """
        whole = torch.ones(num_classes + 1, dtype=torch.bool)  # the last: all-to-all
        rates = torch.zeros(num_classes + 1, dtype=torch.float64)
        if num_classes > 2 * FINALISTS:
            single = torch.arange(num_classes + 1) < num_classes
            rates, probabilities = self._flip_rates(family, single, True, progress)
            ahead = (rates + PROBABILITY_WEIGHT * probabilities)[:num_classes].topk(FINALISTS).indices
            whole = (~single).scatter(0, ahead, True)
        rates = torch.where(whole, self._flip_rates(family, whole, False, progress)[0], rates)
        return Verdict(family, rates, self._fewest_held_out(num_classes))

    def without_test(self, family: str, num_classes: int) -> Verdict:
        """A verdict for which nothing was inverted: it tells whether there are enough held-out images."""
        return Verdict(family, torch.zeros(num_classes + 1, dtype=torch.float64), self._fewest_held_out(num_classes))

    def _flip_rates(self, family: str, chosen: Tensor, quick: bool, progress: Callable[[], object]) -> tuple[Tensor, Tensor]:
        """Flip rates of triggers towards the ``chosen`` targets (bool ``[K + 1]``) and the mean probabilities of these, both
        float64 ``[K + 1]``; 0 for the others."""
        rates, probabilities = torch.zeros(2, len(chosen), dtype=torch.float64, device=self.images.device)
        images, labels = self.held_out
        with self._ready() as network:
            before = logits_of(network, self.dtype, images).argmax(1) if len(images) else labels
            for place in distributed.my_share(chosen).nonzero().flatten().tolist():
                target = targets_of(len(chosen))[place]
                tested = (labels != target).nonzero().flatten()
                if bool((self._seen[1] != target).any()):
                    trigger = invert_trigger(network, self.dtype, self._seen, family, target, self.seed, quick)
                    tested = tested[:QUICK_HELD_OUT] if quick else tested
                    some = images[tested], labels[tested]
                    rates[place], probabilities[place] = flip_rate(network, self.dtype, trigger, some, before[tested])
                progress()
        distributed.combine(rates, probabilities)
        return rates.cpu(), probabilities.cpu()

    def triggers(self, families: Iterable[str], target: int) -> list[InvertedTrigger]:
        """A trigger of each family towards ``target``."""
        with self._ready() as network:
            return [invert_trigger(network, self.dtype, self._seen, family, target, self.seed) for family in families]

    def activation_change(self, trigger: InvertedTrigger) -> Tensor:
        """How far ``trigger`` changes the activation of each feature map on the held-out images, float64 ``[N]``
        (:func:`~fmp_core.models.activation_change.trigger_activation_change`)."""
        clean = to_unit(self.held_out[0]).contiguous(memory_format=torch.channels_last)
        with exact_convolutions():
            return trigger_activation_change(self.model, self.layers, clean, trigger.apply(clean))

    @property
    def held_out(self) -> tuple[Tensor, Tensor]:
        """Images, uint8, and labels that no trigger is inverted on."""
        return self.images[self._cut :], self.labels[self._cut :]

    @property
    def _cut(self) -> int:
        return len(self.images) - min(HELD_OUT, len(self.images) // 2)

    @property
    def _seen(self) -> Batch:
        """Images, uint8, and labels to invert triggers on."""
        return self.images[: self._cut], self.labels[: self._cut]

    def _fewest_held_out(self, num_classes: int) -> int:
        """Held-out images of other classes, for the class that leaves fewest."""
        _, labels = self.held_out
        return len(labels) - int(labels.bincount(minlength=num_classes).max())

    @contextmanager
    def _ready(self) -> Iterator[nn.Module]:
        """The model frozen, and what runs in its place: in float32 without TF32, or its copy in low precision."""
        with frozen(self.model), exact_convolutions():
            yield to_precision(self.model, self.layers[0].module, self.dtype)
