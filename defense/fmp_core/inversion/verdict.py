"""The verdict on a model: is it backdoored, and towards which class? Not in the paper; no poisoned image is used.

In a clean model a common perturbation that flips predictions to one class flips about as many to others. A backdoor is a class
whose inverted trigger flips far more than that of any other (docs/experiments/strong.md has the figures behind the threshold).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fmp_core.inversion.trigger import ALL_TO_ALL, targets_of

LEAST_MARGIN = 0.3  # of the highest flip rate over the runner-up
NEXT = "the class after their own"
LEAST_HELD_OUT = 50  # images below which a margin proves nothing: one of three is 33 points


@dataclass(frozen=True)
class Verdict:
    """What the inverted triggers of one family say about a model.

    ``flip_rates`` float64 ``[K + 1]``: for each class, the share of held-out images of other classes whose prediction its
    inverted trigger flips to it; last, the share that the all-to-all trigger flips to the class after their own. ``held_out``:
    how many images that is, for the class that leaves fewest.
    """

    family: str
    flip_rates: Tensor
    held_out: int

    @property
    def target(self) -> int:
        """The class with the highest flip rate, or :data:`~.trigger.ALL_TO_ALL`."""
        return targets_of(len(self.flip_rates))[int(self.flip_rates.argmax())]

    @property
    def margin(self) -> float:
        """How far the highest flip rate is above the runner-up."""
        best, runner_up = self.flip_rates.topk(2).values.tolist()
        return float(best - runner_up)

    @property
    def too_few(self) -> bool:
        """Whether there are too few held-out images to tell."""
        return self.held_out < LEAST_HELD_OUT

    @property
    def backdoored(self) -> bool:
        return self.margin >= LEAST_MARGIN and not self.too_few

    def __str__(self) -> str:
        rates, places = self.flip_rates.topk(2)
        targets = [targets_of(len(self.flip_rates))[place] for place in places.tolist()]
        names = [NEXT if target == ALL_TO_ALL else f"class {target}" for target in targets]
        first, second = (f"{100 * rate:.1f} % to {name}" for rate, name in zip(rates, names, strict=True))
        finding = "a backdoor" if self.backdoored else "too few images to tell" if self.too_few else "no backdoor found"
        return f"{self.family} triggers flip at most {first}, then {second}: {finding}"

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
