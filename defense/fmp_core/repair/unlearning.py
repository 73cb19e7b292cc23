"""Images to unlearn a backdoor on: clean ones with a inverted trigger, and their true labels (not in the paper).

Fine-tuning on clean images alone revives a pruned backdoor (docs/strong.md). Images that carry what turns the attacked model to
the target, with their true labels, teach it that this means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fmp_core.inversion.trigger import InvertedTrigger
from fmp_core.inversion.verdict import TriggerSearch
from fmp_core.models.evaluate import to_unit
from fmp_core.system.devices import rows_per_batch


@dataclass(frozen=True)
class Unlearning:
    """Makes each epoch's images with triggers: those of the attacked model and, from the second epoch on, those that the model
    answers to by then.

    Args:
        search: in the model that is trained, on the clean images of the fine-tuning.
        triggers: at least one, of the attacked model.
    """

    search: TriggerSearch
    triggers: Sequence[InvertedTrigger]

    def __call__(self, epoch: int) -> Tensor:
        families, target = [trigger.family for trigger in self.triggers], self.triggers[0].target
        now = self.search.triggers(families, target) if epoch else []
        return unlearning_images(self.search.images, [*self.triggers, *now], self.search.seed + epoch)


def unlearning_images(images: Tensor, triggers: Sequence[InvertedTrigger], seed: int) -> Tensor:
    """Each image with one of the ``triggers`` (at least one), drawn by ``seed``; uint8 ``[M, C, H, W]`` in and out."""
    drawn = torch.randint(len(triggers), (len(images),), generator=torch.Generator().manual_seed(seed))
    made = torch.empty_like(images)
    for number, trigger in enumerate(triggers):
        for rows in (drawn == number).nonzero().flatten().to(images.device).split(rows_per_batch(images.device)):
            made[rows] = trigger.on(to_unit(images[rows])).mul(255).round().to(torch.uint8)
    return made
