"""The verdict on a defense: by the interval, and against what clean images get without a trigger."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from fmp_core.results.removal import attack_outcome
from fmp_core.results.summary import advice


def predictions(before: tuple[int, int], after: tuple[int, int], images: int = 1000) -> pd.DataFrame:
    """``(triggered, clean)`` images of class 1 that get the attacker's class 0; 100 clean ones show class 0."""
    frames = [pd.DataFrame({"poisoned": False, "label": 0, "target": -1, "before": [0] * 100, "after": 0})]
    for poisoned, target in ((True, 0), (False, -1)):
        hits = [when[0 if poisoned else 1] for when in (before, after)]
        columns = {name: [0] * count + [1] * (images - count) for name, count in zip(("before", "after"), hits, strict=True)}
        frames.append(pd.DataFrame({"poisoned": poisoned, "label": 1, "target": target, **columns}))
    return pd.concat(frames, ignore_index=True)


@pytest.mark.parametrize(
    ("before", "after", "images", "outcome", "certain"),
    [
        ((980, 5), (20, 5), 1000, "removed", True),
        ((980, 5), (300, 5), 1000, "weakened", True),
        ((980, 5), (900, 5), 1000, "still works", True),
        ((980, 5), (95, 5), 1000, "weakened", False),  # 9.5 %, but up to 11.5 % by its interval
        ((980, 5), (180, 120), 1000, "removed", True),  # 18 %, but clean images get the class in 12 % as well
        ((980, 5), (180, 5), 1000, "weakened", True),
        ((980, 5), (600, 200), 1000, "weakened", True),  # above half of before, not above chance
        ((50, 5), (20, 5), 1000, "none before", True),
        ((150, 120), (20, 5), 1000, "none before", True),
        ((5, 0), (2, 0), 100, "none before", False),
        ((9, 0), (0, 0), 9, "weakened", False),  # 9 images show little
        ((1, 0), (0, 0), 1, "still works", False),
        ((980, 5), (1000, 1000), 1000, "still works", True),  # a model that says the attacker's class of everything
    ],
)
def test_the_verdict(before: tuple[int, int], after: tuple[int, int], images: int, outcome: str, certain: bool):
    found = attack_outcome(predictions(before, after, images))
    assert (found["outcome"], found["certain"]) == (outcome, certain)
    assert found["asr_before"] == before[0] / images and found["asr_after"] == after[0] / images
    assert found["chance_before"] == before[1] / images and found["chance"] == after[1] / images
    assert found["excess"] == pytest.approx((after[0] - after[1]) / images)
    assert found["excess_low"] <= found["excess"] <= found["excess_high"]
    assert json.loads(json.dumps(found)) == found


def test_a_model_that_diverged_removes_nothing():
    """It says class 0 of everything, which may not be the attacker's class."""
    found = attack_outcome(predictions((980, 5), (0, 0)), diverged=True)
    assert (found["outcome"], found["certain"]) == ("diverged", True)
    metrics = {"removal": found, "clean_images": 5000, "before": {"test_acc": 0.9}, "after": {"test_acc": 0.1}}
    assert advice(metrics) == ["The repaired model is of no use, because its outputs are not numbers: try a smaller --lr."]


def test_exactly_three_points_of_accuracy_are_no_high_price():
    metrics = {"removal": {"outcome": "removed"}, "clean_images": 5000, "settings": {"epochs": 1}}
    assert advice({**metrics, "before": {"test_acc": 0.92}, "after": {"test_acc": 0.89}}) == []
    assert len(advice({**metrics, "before": {"test_acc": 0.92}, "after": {"test_acc": 0.8899}})) == 1


def test_all_to_all_counts_each_class_against_its_own_target():
    clean = pd.DataFrame({"poisoned": False, "label": [0, 1, 2] * 40, "target": -1})
    clean = clean.assign(before=clean["label"], after=[(label + (row < 30)) % 3 for row, label in enumerate(clean["label"])])
    triggered = pd.DataFrame({"poisoned": True, "label": [0, 1, 2] * 40}).assign(target=[1, 2, 0] * 40, before=[1, 2, 0] * 40)
    found = attack_outcome(pd.concat([clean, triggered.assign(after=triggered["label"])], ignore_index=True))
    assert (found["chance_before"], found["chance"], found["outcome"]) == (0, 0.25, "removed")


def test_without_clean_images_of_other_classes_there_is_no_chance_level():
    frame = predictions((980, 5), (20, 5))
    found = attack_outcome(frame[frame["poisoned"] | (frame["label"] == 0)])
    assert found["chance"] is None and found["asr_after"] == 0.02
