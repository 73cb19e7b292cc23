"""The benchmark's figures of a model and of a defense.

``test_acc`` (Acc) is the share of the clean test images that are classified correctly. Of the triggered ones, ``test_asr``
(ASR) is the share that get the attacker's class, ``test_ra`` (RA) the share that get their true class. Fractions in [0,1].
"""

from __future__ import annotations

from collections.abc import Mapping

METRICS = ("test_acc", "test_asr", "test_ra")
HEADLINES = {"test_acc": "Acc", "test_asr": "ASR", "test_ra": "RA", "der": "DER", "rir": "RIR"}
LOW_IS_GOOD = frozenset({"test_asr"})


def ratings(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What a defense gained against what it cost, in [0,1]; 0.5 is no effect. A negative gain or drop counts as 0.

    Defense effectiveness rating (DER, Zhu et al. 2023): the drop of ASR against that of Acc. Robust improvement rate (RIR,
    BackdoorBench's ``visual_metric``): the rise of RA against it.
    """
    gains = {"der": before["test_asr"] - after["test_asr"], "rir": after["test_ra"] - before["test_ra"]}
    drop = max(0.0, before["test_acc"] - after["test_acc"])
    return {name: (max(0.0, gain) - drop + 1) / 2 for name, gain in gains.items()}
