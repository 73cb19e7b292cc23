"""Whether a defense removed the backdoor: the verdict that metrics.json, the terminal and the report share."""

from __future__ import annotations

from typing import TypedDict

import pandas as pd

from fmp_core.results.intervals import Interval, difference, wilson

REMOVED = 0.10  # of triggered images above chance: less counts as no backdoor, as backdoor papers have it
WEAKENED = 0.5  # of what the trigger reached above chance before the defense


class AttackOutcome(TypedDict):
    """What became of the attack; shares in [0,1].

    outcome: ``removed``, ``weakened`` or ``still works``; ``none before`` if the attacked model had no working backdoor.
    certain: whether the whole 95 % interval says so; if not, the test set is too small to rule out the next better outcome.
    asr_before, asr_after: share of the triggered test images that get the attacker's class.
    chance_before, chance: share of the clean test images of other classes that get that class without any trigger, before and
        after the defense; None if there are no such images.
    excess: ``asr_after`` above ``chance``, i.e. what the trigger itself does; ``excess_low``, ``excess_high`` its 95 % limits.
    """

    outcome: str
    certain: bool
    asr_before: float
    asr_after: float
    chance_before: float | None
    chance: float | None
    excess: float
    excess_low: float
    excess_high: float


def attack_outcome(predictions: pd.DataFrame) -> AttackOutcome:
    """The verdict on a defense, from its ``predictions.csv`` (:func:`~fmp_core.results.predictions.prediction_frame`).

    What the trigger reaches above chance is compared, by the upper limit of its 95 % interval, with 10 points (``removed``) and
    with half of what it was (``weakened``): a success of the defense has to be shown, and few images show little. A model that
    gives the attacker's class to most clean images is not credited with removing anything.

    Args:
        predictions: columns ``poisoned``, ``label``, ``target``, ``before``, ``after``; one row per test image.
    """
    asr_before, chance_before = success(predictions, "before"), chance(predictions, "before")
    asr_after, chance_after = success(predictions, "after"), chance(predictions, "after")
    before, after = difference(asr_before, chance_before), difference(asr_after, chance_after)

    def outcome(excess: float) -> str:
        if excess < REMOVED:
            return "removed"
        return "weakened" if excess < WEAKENED * before.value else "still works"

    verdict, certain = outcome(after.high), outcome(after.low) == outcome(after.high)
    if before.value < REMOVED:
        verdict, certain = "none before", before.high < REMOVED
    elif chance_after.value > 0.5:
        verdict, certain = "still works", True
    known = bool(len(_goals(predictions)))
    return AttackOutcome(
        outcome=verdict,
        certain=certain,
        asr_before=asr_before.value,
        asr_after=asr_after.value,
        chance_before=chance_before.value if known else None,
        chance=chance_after.value if known else None,
        excess=after.value,
        excess_low=after.low,
        excess_high=after.high,
    )


def success(predictions: pd.DataFrame, when: str) -> Interval:
    """ASR ``before`` or ``after``: the share of the triggered images that get the attacker's class."""
    rows = predictions[predictions["poisoned"].astype(bool)]
    return _share(rows[when] == rows["target"])


def chance(predictions: pd.DataFrame, when: str) -> Interval:
    """The share of the clean images of other classes that get the attacker's class, ``before`` or ``after``."""
    goals = _goals(predictions)
    return _share(goals[when] == goals["target"])


def _goals(predictions: pd.DataFrame) -> pd.DataFrame:
    """The clean images that the attacker would want classified otherwise, ``target`` as what.

    An attack on all classes at once (all-to-all) has one target for each true class; its clean images have that of theirs.
    """
    poisoned = predictions["poisoned"].astype(bool)
    clean, wanted = predictions[~poisoned], predictions.loc[poisoned, ["label", "target"]].drop_duplicates()
    targets = wanted["target"].unique()
    goals = clean.assign(target=targets[0]) if len(targets) == 1 else clean.drop(columns="target").merge(wanted, on="label")
    return goals[goals["label"] != goals["target"]]


def _share(hits: pd.Series) -> Interval:
    return wilson(float(hits.mean()) if len(hits) else 0.0, len(hits))
