"""Whether a defense removed the backdoor: the outcome that metrics.json, the terminal and the report share."""

from __future__ import annotations

from typing import Any

import pandas as pd

from fmp_core.results.intervals import difference, share_of

REMOVED = 0.10  # of triggered images above chance: less counts as no backdoor, as backdoor papers have it
WEAKENED = 0.5  # of what the trigger reached above chance before the defense

NOT_TESTED, DIVERGED = "not tested", "diverged"
OUTCOMES = {  # in words, by (outcome, certain)
    ("removed", True): "The backdoor is removed",
    ("weakened", True): "The backdoor is weakened, not removed",
    ("weakened", False): "The backdoor is weakened, perhaps removed",
    ("still works", True): "The backdoor still works",
    ("still works", False): "The backdoor may still work",
    ("none before", True): "This record has no working backdoor to remove",
    ("none before", False): "This record shows no working backdoor to remove",
    (DIVERGED, True): "The repaired model is of no use, because its outputs are not numbers",
    (NOT_TESTED, True): "No triggered image is known, so attack success was not measured",
}


def attack_outcome(predictions: pd.DataFrame, diverged: bool = False) -> dict[str, Any]:
    """What became of the attack, from ``predictions.csv`` (:func:`~fmp_core.results.predictions.prediction_frame`).

    What the trigger reaches above chance is compared, by the upper limit of its 95 % interval, with 10 points (``removed``) and
    with half of what it was (``weakened``): a success of the defense has to be shown, and few images show little. A model that
    gives the attacker's class to most clean images is not credited with removing anything, nor is one that has ``diverged``,
    whose outputs are not numbers and so mean class 0.

    Returns:
        ``outcome``: ``removed``, ``weakened`` or ``still works``; ``none before`` if the attacked model had no working
        backdoor; ``diverged``; ``not tested`` if there is no triggered image, and then only ``certain`` goes with it.
        ``certain``: whether the whole interval says so; if not, the test set is too small to rule out the next better outcome.
        ``asr_before``, ``asr_after``: share of the triggered images that get the attacker's class. ``chance_before``,
        ``chance``: share of the clean images of other classes that get it, before and after the defense; None if there are no
        such images. ``excess``: ``asr_after`` above ``chance``; ``excess_low``, ``excess_high``: its limits.
    """
    triggered = predictions[predictions["poisoned"]]
    if triggered.empty:
        return {"outcome": NOT_TESTED, "certain": True}
    others = _images_of_other_classes(predictions)
    asr_before, asr_after = (share_of(triggered[when] == triggered["target"]) for when in ("before", "after"))
    chance_before, chance = (share_of(others[when] == others["target"]) for when in ("before", "after"))
    before, after = difference(asr_before, chance_before), difference(asr_after, chance)

    def outcome(excess: float) -> str:
        if excess < REMOVED:
            return "removed"
        return "weakened" if excess < WEAKENED * before.value else "still works"

    result, certain = outcome(after.high), outcome(after.low) == outcome(after.high)
    if diverged:
        result, certain = DIVERGED, True
    elif before.value < REMOVED:
        result, certain = "none before", before.high < REMOVED
    elif chance.value > 0.5:
        result, certain = "still works", True
    return {
        "outcome": result,
        "certain": certain,
        "asr_before": asr_before.value,
        "asr_after": asr_after.value,
        "chance_before": chance_before.value if len(others) else None,
        "chance": chance.value if len(others) else None,
        "excess": after.value,
        "excess_low": after.low,
        "excess_high": after.high,
    }


def _images_of_other_classes(predictions: pd.DataFrame) -> pd.DataFrame:
    """The clean images that the attacker would want classified otherwise, ``target`` as what.

    An attack on all classes at once (all-to-all) has one target for each true class; its clean images have that of theirs.
    """
    poisoned = predictions["poisoned"]
    clean, wanted = predictions[~poisoned], predictions.loc[poisoned, ["label", "target"]].drop_duplicates()
    targets = wanted["target"].unique()
    aimed = clean.assign(target=targets[0]) if len(targets) == 1 else clean.drop(columns="target").merge(wanted, on="label")
    return aimed[aimed["label"] != aimed["target"]]
