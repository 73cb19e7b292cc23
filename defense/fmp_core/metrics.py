"""The benchmark's figures of a model and of a defense: their names, and the two that compare before with after.

``test_acc`` (Acc) is the share of the clean test images that are classified correctly. Of the triggered ones, ``test_asr``
(ASR) is the share that get the attacker's class, ``test_ra`` (RA) the share that get their true class. Fractions in [0,1].
"""

from __future__ import annotations

from collections.abc import Mapping

METRICS = ("test_acc", "test_asr", "test_ra")
RATINGS = ("der", "rir")  # of a defense, from METRICS before and after it
HEADLINES = {"test_acc": "Acc", "test_asr": "ASR", "test_ra": "RA", "der": "DER", "rir": "RIR"}
LOW_IS_GOOD = frozenset({"test_asr"})


def rating(gain: float, acc_drop: float) -> float:
    """What a defense gained against what it cost, in [0,1]; 0.5 is no effect. A negative gain or drop counts as 0."""
    return (max(0.0, gain) - max(0.0, acc_drop) + 1) / 2


def defense_effectiveness(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Defense effectiveness rating (DER): the drop of ASR against the drop of Acc (Zhu et al. 2023)."""
    return rating(before["test_asr"] - after["test_asr"], before["test_acc"] - after["test_acc"])


def robust_improvement(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Robust improvement rate (RIR): the rise of RA against the drop of Acc (BackdoorBench: ``visual_metric``)."""
    return rating(after["test_ra"] - before["test_ra"], before["test_acc"] - after["test_acc"])


def ratings(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """DER and RIR by name."""
    return {"der": defense_effectiveness(before, after), "rir": robust_improvement(before, after)}
