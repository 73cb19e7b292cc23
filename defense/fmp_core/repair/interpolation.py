"""Interpolation: the final weights are averages of the fine-tuned and the attacked model's (not in the paper).

Unlearning costs accuracy on clean images. Between the fine-tuned weights and those it began with lie models that have more of
it, and a part of the way back the backdoor is still gone (docs/experiments/strong.md has the figures). Averaging the weights of
a model before and after fine-tuning is WiSE-FT (Wortsman et al., Robust fine-tuning of zero-shot models, CVPR 2022). Maps that
fine-tuning kept at zero are set to zero again afterwards: averaged, too, they can bring part of the backdoor back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Interpolation:
    """The weights and batch norm statistics ``state`` of the attacked model, and their ``share`` in [0,1] of the average."""

    state: Mapping[str, Tensor]
    share: float

    @staticmethod
    def towards(model: nn.Module, share: float) -> Interpolation:
        """Towards ``model`` as it is now."""
        return Interpolation({name: tensor.clone() for name, tensor in model.state_dict().items()}, share)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Move ``model`` in place; counts of batches stay its own."""
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.lerp_(self.state[name], self.share)
