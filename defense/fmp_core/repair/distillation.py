"""Distillation: fine-tuning keeps the attacked model's answers to clean images, but for what they say of the target.

Not in the paper. A few clean images teach less than the attacked model knows. It knows its backdoor, too, and gives some of the
target to whatever resembles a trigger; so that part of its answers is left out (docs/strong.md has the figures).
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmp_core.models.evaluate import to_unit


@dataclass(frozen=True)
class Teacher:
    """A model as it was, whose answers are worth ``weight`` of the labels.

    Args:
        model: takes pixels in [0,1]; in evaluation mode, without gradients.
        target: the class of its backdoor, if one was shown.
    """

    model: nn.Module
    weight: float
    target: int | None = None

    @staticmethod
    def copy_of(model: nn.Module, weight: float, target: int | None = None) -> Teacher:
        return Teacher(deepcopy(model).eval().requires_grad_(False), weight, target)

    def loss(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """``weight`` times the mean Kullback-Leibler divergence from its answers to those of ``logits`` ``[B, K]``."""
        told = self.answers(images, labels)
        return self.weight * F.kl_div(logits.float().log_softmax(1), told, reduction="none").sum(1).mean()

    @torch.no_grad()
    def answers(self, images: Tensor, labels: Tensor) -> Tensor:
        """Probabilities ``[B, K]`` for uint8 images; of those not labelled ``target``, none for it.

        The other classes share what it had; an image for which nothing is left gets zeros.
        """
        told = self.model(to_unit(images).contiguous(memory_format=torch.channels_last)).float().softmax(1)
        if self.target is None:
            return told
        told[:, self.target] *= labels == self.target
        return told / told.sum(1, keepdim=True).clamp_min(torch.finfo(told.dtype).tiny)
