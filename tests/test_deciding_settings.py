"""Which settings the numbers do not depend on, all of them; and which flags are said to do nothing."""

from __future__ import annotations

from typing import Any

import pytest
from fmp_core.settings import (
    FIELDS,
    Settings,
    Stage,
    deciding_ranking,
    deciding_result,
    load_settings,
    names,
    unused,
)

PLACES = {"result_file", "record_root", "dataset_path", "save_folder", "defense_name", "log", "checkpoint_save"}
HOW = {"preset", "device", "fresh", "wait", "chunk", "memory"}
CHECKED = {"dataset", "model", "num_classes"}  # against the record, which decides
SHOWN = {"report", "tensorboard", "frequency_save", "quiet", "log_level"}


def test_all_but_places_speed_and_output_decides() -> None:
    """What is missing here would make runs of other settings pass for repetitions, or go on from each other's state."""
    without_effect = names(Stage.NO_EFFECT, decides=False)
    assert set(FIELDS) - set(deciding_result()) == {*PLACES, *HOW, *CHECKED, *SHOWN, *without_effect}


def test_scores_depend_on_these_settings_and_no_others() -> None:
    loading = {"mean", "std", "ratio", "index", "random_seed"}
    ranking = {"eps", "frg_steps", "alpha", "frg_samples", "ranking", "dtype"}
    assert set(deciding_ranking(Settings())) == loading | ranking
    assert set(deciding_ranking(Settings(ranking="racing"))) == loading | ranking | {"p", "scope"}


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ({"alpha": "0.01"}, {"frg_steps": "3"}),
        ({"eps": "2/255", "selection": "random"}, {"selection": "frg"}),
        ({"p": "8", "scope": "global", "selection": "none"}, {"selection": "random"}),
        ({"budget": "0.2", "unlearn": "0.3"}, {"selection": "trigger"}),
        ({"steplr_stepsize": "3"}, {"lr_scheduler": "StepLR"}),
        ({"steplr_milestones": "2,3"}, {"lr_scheduler": "MultiStepLR"}),
        ({"steplr_gamma": "0.5"}, {"lr_scheduler": "MultiStepLR"}),
        ({"lr": "0.1", "epochs": "0"}, {"epochs": "1"}),
        ({"ratio": "0.5", "index": "i.txt"}, None),
    ],
)
def test_a_flag_is_said_to_do_nothing_where_it_does_nothing(given: dict[str, Any], needed: dict[str, Any] | None) -> None:
    idle = [name for name in given if name not in ("selection", "epochs", "index")]
    assert [sentence.split()[0] for sentence in unused(load_settings(given))] == [f"--{name}" for name in idle]
    if needed:
        assert unused(load_settings(given | needed)) == []
