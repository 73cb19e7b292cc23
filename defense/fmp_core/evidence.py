"""Is the model backdoored, towards which class, and by which feature maps? Not in the paper; no poisoned image is used.

The paper counts how many FRG images a map leaves correct. What a backdoor's map does is more particular: it pushes images of
all classes towards *one* label. So the mean logits over a map's images, less the mean over the maps of its layer, name a class,
and the maps that push hardest vote. On natural images the votes of a clean model scatter over classes; where they do not, its
images stay correctly classified (docs/strong.md has the figures behind the two thresholds).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ranking import Choice, Scores, slices

# Families of perturbations (frg.Attack) in the order they are asked, with the size eps of dense steps and start noise.
FAMILIES = {"sparse": 1 / 255, "dense": 8 / 255}
VOTERS = 64  # 1/64 of a layer's maps vote, at least one
LEAST_SHARE = 0.7  # of the votes for one class
LEAST_LOST = 0.2  # of the voters' images lost, beyond those the model gets wrong anyway


@dataclass(frozen=True)
class Evidence:
    """What the feature maps say under one family of perturbations.

    ``target``: the class with most ``votes`` (int64 ``[K]``); ``share``: its share of them.
    ``lost``: accuracy on the clean images less that on the voters' FRG images.
    ``push`` float64 ``[N]``: how far a map's shift towards ``target`` stands out of its layer, in robust standard deviations.
    """

    family: str
    target: int
    votes: Tensor
    share: float
    lost: float
    push: Tensor

    @property
    def backdoored(self) -> bool:
        return self.share >= LEAST_SHARE and self.lost >= LEAST_LOST

    def as_dict(self) -> dict[str, Any]:
        return {
            "backdoored": self.backdoored,
            "target": self.target,
            "family": self.family,
            "votes": self.votes.tolist(),
            "share": self.share,
            "lost": self.lost,
        }


def weigh(family: str, scores: Scores, clean_accuracy: float) -> Evidence:
    """The evidence in the scores of one family; ``clean_accuracy`` in [0,1] is the model's on the clean images scored."""
    shift = torch.cat([scores.logits[where] - scores.logits[where].mean(0) for _, where in slices(scores.layers)])
    hardest, towards = shift.max(1)
    voters = []
    for layer, where in slices(scores.layers):
        count = max(1, layer.channels // VOTERS)
        voters.append(hardest[where].topk(count).indices + where.start)
    chosen = torch.cat(voters)
    votes = torch.bincount(towards[chosen], minlength=shift.shape[1])
    target = int(votes.argmax())
    push = _standing_out([shift[where, target] for _, where in slices(scores.layers)])
    still_correct = float(scores.correct[chosen].double().mean()) / scores.samples
    return Evidence(family, target, votes, float(votes[target]) / len(chosen), clean_accuracy - still_correct, push)


def _standing_out(layers: list[Tensor]) -> Tensor:
    """Distances from each layer's median in robust standard deviations (1.4826 times the median absolute deviation).

    Where most maps of a layer do nothing that deviation is 0 or nearly so; at least a tenth of the median layer's counts.
    """
    distances = [values - values.median() for values in layers]
    deviations = torch.stack([1.4826 * distance.abs().median() for distance in distances])
    floor = 0.1 * float(deviations.quantile(0.5)) + 1e-12
    return torch.cat([distance / max(float(spread), floor) for distance, spread in zip(distances, deviations, strict=True)])


def choose_within_budget(push: Tensor, budget: float, accuracy: Callable[[Tensor], float]) -> Choice:
    """As many maps, hardest push first, as cost at most ``budget`` of accuracy; found by bisection.

    Args:
        push: float64 ``[N]``.
        budget: in [0,1].
        accuracy: of the model without the maps of a bool mask ``[N]``, on held-out clean images, in [0,1].
    """
    order = push.argsort(descending=True, stable=True)

    def lowest(count: int) -> Tensor:
        mask = torch.zeros(len(push), dtype=torch.bool)
        mask[order[:count]] = True
        return mask

    floor = accuracy(lowest(0)) - budget
    kept, lost = 0, len(push) // 4  # a quarter of all maps is never within reach
    while lost - kept > max(1, len(push) // 1000):
        middle = (kept + lost) // 2
        if accuracy(lowest(middle)) >= floor:
            kept = middle
        else:
            lost = middle
    return Choice(lowest(kept))
