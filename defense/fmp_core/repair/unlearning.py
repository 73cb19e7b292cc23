"""Unlearning: training on clean images that carry an inverted trigger, with their true labels (not in the paper).

Fine-tuning on clean images alone revives a pruned backdoor. Images with a trigger and their true labels teach the model to
ignore it. docs/experiments/strong.md has the figures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fmp_core.inversion.search import TriggerSearch
from fmp_core.inversion.trigger import InvertedTrigger
from fmp_core.models.evaluate import to_unit
from fmp_core.system.devices import rows_per_batch


@dataclass(frozen=True)
class Unlearning:
    """Substitutes for the clean images of each epoch, which carry triggers of the attacked model and, from the second epoch on,
    triggers of the model as it is by then.

    Args:
        search: in the model that is trained, on the clean images of the fine-tuning.
        triggers: of the attacked model, at least one.
    """

    search: TriggerSearch
    triggers: Sequence[InvertedTrigger]

    def substitutes(self, epoch: int) -> Tensor:
        """The clean images with triggers, uint8 ``[M, C, H, W]``, for the 0-based ``epoch``."""
        families, target = [trigger.family for trigger in self.triggers], self.triggers[0].target
        seed = _seed_of_epoch(self.search.seed, epoch)
        current = replace(self.search, seed=seed).triggers(families, target) if epoch else []
        return with_random_triggers(self.search.images, [*self.triggers, *current], seed)


def _seed_of_epoch(seed: int, epoch: int) -> int:
    """Another one for each epoch of each seed; by ``seed + epoch`` epoch 1 of seed 0 would draw what epoch 0 of seed 1 does."""
    return int.from_bytes(hashlib.sha256(f"unlearning {seed} {epoch}".encode()).digest()[:7], "big")


def with_random_triggers(images: Tensor, triggers: Sequence[InvertedTrigger], seed: int) -> Tensor:
    """Each image with one of the ``triggers`` (at least one), drawn by ``seed``; uint8 ``[M, C, H, W]`` in and out."""
    drawn = torch.randint(len(triggers), (len(images),), generator=torch.Generator().manual_seed(seed))
    result = torch.empty_like(images)
    for number, trigger in enumerate(triggers):
        for rows in (drawn == number).nonzero().flatten().to(images.device).split(rows_per_batch(images.device)):
            result[rows] = trigger.apply(to_unit(images[rows])).mul(255).round().to(torch.uint8)
    return result
