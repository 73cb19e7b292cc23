"""The verdict on a model: is it backdoored, and towards which class? Not in the paper; no poisoned image is used.

In a clean model a common perturbation that flips predictions to one class flips about as many to others. A backdoor is a class
whose inverted trigger flips far more than that of any other (docs/experiments/strong.md has the figures behind the threshold).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fmp_core.inversion.trigger import ALL_TO_ALL

LEAST_MARGIN = 0.3  # of a flip rate over the runner-up's
NEXT = "the class after their own"
LEAST_HELD_OUT = 50  # images below which a margin proves nothing: one of three is 33 points


@dataclass(frozen=True)
class Verdict:
    """What the inverted triggers of one family say about a model.

    ``flip_rates`` float64 ``[K + 1]``: for each class, the share of held-out images of other classes whose prediction its
    inverted trigger changes to it; last, the share that the all-to-all trigger changes to the class after their own. Images
    that have that prediction without a trigger do not count as flipped: a weak or biased model has many. ``held_out``: how many
    images of other classes there are, for the class that leaves fewest.
    """

    family: str
    flip_rates: Tensor
    held_out: int

    @property
    def target(self) -> int:
        """The class with the highest flip rate, or :data:`~.trigger.ALL_TO_ALL` where its margin is the larger one."""
        return self._best[0]

    @property
    def margin(self) -> float:
        """How far the flip rate of :attr:`target` is above the runner-up's."""
        return self._best[2]

    @property
    def _best(self) -> tuple[int, int, float]:
        """Target, runner-up and margin. A class is compared with the other classes, all-to-all with all of them.

        Not a class with all-to-all: a backdoor towards class t also sends all images of class t-1 to the class after their own.
        """
        rates, places = self.flip_rates[:-1].topk(2)
        first, second = places.tolist()
        single, mutual = float(rates[0] - rates[1]), float(self.flip_rates[-1] - rates[0])
        return (ALL_TO_ALL, first, mutual) if mutual > single else (first, second, single)

    @property
    def too_few(self) -> bool:
        """Whether there are too few held-out images to tell."""
        return self.held_out < LEAST_HELD_OUT

    @property
    def backdoored(self) -> bool:
        return self.margin >= LEAST_MARGIN - 1e-9 and not self.too_few

    def __str__(self) -> str:
        first, second = (f"{100 * self.flip_rates[target]:.1f} % to {self._named(target)}" for target in self._best[:2])
        finding = "a backdoor" if self.backdoored else "too few images to tell" if self.too_few else "no backdoor found"
        return f"{self.family} triggers flip at most {first}, then {second}: {finding}"

    @staticmethod
    def _named(target: int) -> str:
        return NEXT if target == ALL_TO_ALL else f"class {target}"

    def as_dict(self) -> dict[str, Any]:
        """The value of ``verdict`` in metrics.json; its keys are that file's format."""
        return {
            "backdoored": self.backdoored,
            "target": "all-to-all" if self.target == ALL_TO_ALL else self.target,
            "family": self.family,
            "success": [round(rate, 4) for rate in self.flip_rates[:-1].tolist()],
            "success_all_to_all": round(float(self.flip_rates[-1]), 4),
            "lead": round(self.margin, 4),
            "held_out": self.held_out,
            "too_few": self.too_few,
        }


def in_words(found: Mapping[str, Any]) -> str:
    """What :meth:`Verdict.as_dict` gave, in sentences."""
    mutual, target = found["target"] == "all-to-all", found["target"]
    rate = found["success_all_to_all"] if mutual else found["success"][target]
    if found["too_few"]:
        return (
            f"Trigger inversion: no verdict, since {found['held_out']} held-out clean images of other classes are too few; "
            f"{LEAST_HELD_OUT} are needed."
        )
    if found["backdoored"]:
        flips = f"An inverted trigger ({found['family']}) flips the predictions of {100 * rate:.0f} % of images"
        return "Verdict of trigger inversion, from clean images alone: backdoored, " + (
            f"all-to-all. {flips} to the class after their own, {100 * found['lead']:.1f} points more than one flips to any "
            "single class."
            if mutual
            else f"target class {target}. {flips} of other classes to it, {100 * found['lead']:.1f} points more than for the "
            "runner-up."
        )
    flips = f"The best inverted trigger ({found['family']}) flips {100 * rate:.0f} % of images"
    return (
        "Verdict of trigger inversion, from clean images alone: not shown to be backdoored, which does not mean clean. "
        + (f"{flips} to the class after their own" if mutual else f"{flips} of other classes to class {target}")
        + f", {100 * found['lead']:.1f} points more than the runner-up; {100 * LEAST_MARGIN:.0f} are needed."
    )
