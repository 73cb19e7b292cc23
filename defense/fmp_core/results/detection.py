"""What a defense says about a model before it repairs it: is it backdoored, and towards which class?

Two defenses say so: ours with ``--preset strong`` (the verdict in metrics.json), and BackdoorBench's ``nc``, Neural Cleanse
(Wang et al. 2019), whose log holds the L1 norm of the mask it inverted for each class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

VERDICT, NEURAL_CLEANSE = "FMP's verdict", "Neural Cleanse"
NC_THRESHOLD = 2.0  # BB, defense/nc.py: outlier_detection
MAD_OF_NORMAL = 1.4826  # standard deviations of a normal distribution per median absolute deviation
ALL_LABELS = re.compile(rb"\b(\d{1,6}) labels found")
NORM_LINE = re.compile(
    rb"The regularization of mask for target label (\d{1,6}) is (\d{1,30}(?:\.\d{1,30})?(?:e[+-]?\d{1,2})?)\s"
)
MOST_LOG_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Detection:
    """What one detector says about one model.

    ``score``: the verdict's margin in points of 100, or Neural Cleanse's anomaly index; higher means rather backdoored.
    ``flagged``: whether it is above the detector's own threshold. ``named``: the targets it names, most suspicious first.
    """

    detector: str
    score: float
    flagged: bool
    named: tuple[str, ...]

    def as_row(self) -> dict[str, Any]:
        row = {"detector": self.detector, "detection_score": self.score, "flagged": self.flagged}
        return row | {"named": " ".join(self.named) or None}


def detection_of_verdict(verdict: Mapping[str, Any]) -> Detection | None:
    """``verdict`` of metrics.json; None if there is none, or it had too few images to tell."""
    lead = verdict.get("lead")
    if not isinstance(lead, (int, float)) or not -1 <= lead <= 1 or verdict.get("too_few"):
        return None
    flagged = verdict.get("backdoored") is True
    return Detection(VERDICT, round(100 * lead, 2), flagged, (str(verdict.get("target")),) if flagged else ())


def detection_of_neural_cleanse(logs: Sequence[Path]) -> Detection | None:
    """From the first of the ``logs`` of ``nc`` that holds the norms of all classes; None if none does."""
    for path in logs:
        if path.is_file() and path.stat().st_size <= MOST_LOG_BYTES:
            text = path.read_bytes()
            norms, said = {int(label): float(norm) for label, norm in NORM_LINE.findall(text)}, ALL_LABELS.findall(text)
            if said and len(norms) == int(said[-1]) > 1 and list(norms) == list(range(len(norms))):
                return anomaly(list(norms.values()))
    return None


def anomaly(norms: Sequence[float]) -> Detection | None:
    """Neural Cleanse's anomaly index of the mask norms of all classes, as BB computes it; None where it is not defined.

    It is the distance of the smallest norm from the median in median absolute deviations. The lower median is meant, as
    ``torch.median`` gives.
    """
    middle = median_low(norms)
    deviation = MAD_OF_NORMAL * median_low([abs(norm - middle) for norm in norms])
    if not deviation > 0:
        return None
    small = sorted((norm, label) for label, norm in enumerate(norms) if (middle - norm) / deviation > NC_THRESHOLD)
    return Detection(NEURAL_CLEANSE, (middle - min(norms)) / deviation, bool(small), tuple(str(label) for _, label in small))
