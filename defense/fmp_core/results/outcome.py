"""What a run of FMP came to, from its choice of maps to its last test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fmp_core.frg.scorer import Choice, Scores
from fmp_core.inversion.trigger import InvertedTrigger
from fmp_core.inversion.verdict import Evidence
from fmp_core.models.evaluate import Metrics
from fmp_core.repair.finetune import History


@dataclass(frozen=True)
class Outcome:
    """``scores`` and ``evidence`` are None where they were not asked for, ``triggers`` empty where no backdoor was shown.

    ``before`` is the test of the attacked model; ``history`` holds those after pruning or each epoch.
    """

    scores: Scores | None
    evidence: Evidence | None
    triggers: Sequence[InvertedTrigger]
    choice: Choice
    before: Metrics
    history: History

    @property
    def after(self) -> Metrics:
        after = self.history[-1][1]
        assert after is not None  # the last epoch is always tested
        return after
