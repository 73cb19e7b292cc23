"""Distillation: fine-tuning keeps the attacked model's outputs on clean images, except what they say about the target class.

Not in the paper. A few clean images teach less than the attacked model knows. But that model also knows its backdoor, and gives
some probability of the target class to whatever resembles a trigger; that part is left out. docs/experiments/strong.md has the
figures.
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
    """The attacked model as it was, whose outputs count ``weight`` times as much as the labels.

    Args:
        model: takes pixels in [0,1]; in evaluation mode, without gradients.
        target: the class of its backdoor, if the verdict names one.
    """

    model: nn.Module
    weight: float
    target: int | None = None

    @staticmethod
    def copy_of(model: nn.Module, weight: float, target: int | None = None) -> Teacher:
        return Teacher(deepcopy(model).eval().requires_grad_(False), weight, target)

    def loss(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """``weight`` times the mean Kullback-Leibler divergence of the student's ``logits`` ``[B, K]`` from its own outputs.

        ``images`` are uint8 ``[B, C, H, W]``, ``labels`` int64 ``[B]``.
        """
        wanted = self.probabilities(images, labels)
        return self.weight * F.kl_div(logits.float().log_softmax(1), wanted, reduction="none").sum(1).mean()

    @torch.no_grad()
    def probabilities(self, images: Tensor, labels: Tensor) -> Tensor:
        """Class probabilities ``[B, K]`` for uint8 images; 0 for the target class where the label is another one.

        The other classes share what it had; an image for which nothing is left gets zeros.
        """
        outputs = self.model(to_unit(images).contiguous(memory_format=torch.channels_last)).float().softmax(1)
        if self.target is None:
            return outputs
        outputs[:, self.target] *= labels == self.target
        return outputs / outputs.sum(1, keepdim=True).clamp_min(torch.finfo(outputs.dtype).tiny)
