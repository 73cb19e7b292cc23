"""The benchmark's figures of a model and of a defense.

``test_acc`` (Acc) is the share of the clean test images that are classified correctly. Of the triggered ones, ``test_asr``
(ASR) is the share that get the attacker's class, ``test_ra`` (RA) the share that get their true class. Fractions in [0,1].
"""

from __future__ import annotations

from collections.abc import Mapping

MetricValues = Mapping[str, float | None]  # by name; None: there was no triggered image to test on
METRICS = ("test_acc", "test_asr", "test_ra")
HEADLINES = {"test_acc": "Acc", "test_asr": "ASR", "test_ra": "RA", "der": "DER", "rir": "RIR"}
LOW_IS_GOOD = frozenset({"test_asr"})


def ratings(before: MetricValues, after: MetricValues) -> dict[str, float | None]:
    """What a defense gained against what it cost, in [0,1]; 0.5 is no effect. A negative gain or drop counts as 0.

    Defense effectiveness rating (DER, Zhu et al. 2023): the drop of ASR against that of Acc. Robust improvement rate (RIR,
    BackdoorBench's ``visual_metric``): the rise of RA against it.
    """
    acc, asr, ra = (drop(before[name], after[name]) for name in METRICS)
    if acc is None or asr is None or ra is None:
        return {"der": None, "rir": None}
    return {name: (max(0.0, gain) - max(0.0, acc) + 1) / 2 for name, gain in (("der", asr), ("rir", -ra))}


def drop(before: float | None, after: float | None) -> float | None:
    """How much a metric fell; None if one of the two is."""
    return None if before is None or after is None else before - after


def in_percent(values: MetricValues) -> str:
    """Acc, ASR and RA for a line of text."""
    shown = ((HEADLINES[name], values[name]) for name in METRICS)
    return "  ".join(f"{name} -" if value is None else f"{name} {100 * value:.2f} %" for name, value in shown)
