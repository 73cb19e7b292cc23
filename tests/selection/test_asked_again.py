"""What a second run in the same folder ranks or inverts again, and what it reads from the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fmp_core.inputs import DefenderInputs
from fmp_core.inversion import verdict
from fmp_core.selection import select
from fmp_core.settings import Settings, Stage, names
from fmp_core.system.cli import Stages

RANKING: dict[str, Any] = {
    "eps": 2 / 255,
    "frg_steps": 3,
    "alpha": 3 / 255,
    "random_seed": 1,
    "dtype": "bf16",
    "ranking": "racing",
    "frg_samples": 3,
}  # another value of each setting that decides scores
INVERSION: dict[str, Any] = {"random_seed": 1, "dtype": "bf16"}


def reused(defender: DefenderInputs, folder: Path, **changes: Any) -> list[str]:
    """The stages of a selection by FRG that the cache in ``folder`` answered."""
    stages = Stages()
    settings = Settings(**{"frg_samples": 2, "frg_steps": 2, "p": 2, **changes})
    assert select.select_feature_maps(defender, settings, folder, stages).scores is not None
    return stages.reused


def test_every_setting_that_decides_is_among_those_changed_here() -> None:
    assert set(RANKING) == set(names(Stage.RANKING)) and set(INVERSION) == set(names(Stage.INVERSION))


@pytest.mark.parametrize("name", RANKING)
def test_another_setting_of_the_ranking_ranks_again(name: str, defender: DefenderInputs, tmp_path: Path) -> None:
    assert reused(defender, tmp_path) == []
    assert reused(defender, tmp_path, **{name: RANKING[name]}) == []
    assert reused(defender, tmp_path) == ["ranking"]


@pytest.mark.parametrize(("ranking", "read"), [("exact", ["ranking"]), ("racing", [])])
def test_only_a_race_depends_on_where_it_is_cut(
    ranking: str, read: list[str], defender: DefenderInputs, tmp_path: Path
) -> None:
    assert reused(defender, tmp_path, ranking=ranking, frg_steps=1) == []
    for changes in ({"p": 4}, {"scope": "global"}):
        assert reused(defender, tmp_path, ranking=ranking, frg_steps=1, **changes) == read


@pytest.mark.parametrize("changes", [{"chunk": 4}, {"memory": 64}, {"budget": 0.5}, {"epochs": 3, "lr": 0.5}])
def test_settings_of_speed_and_of_later_stages_rank_nothing_again(
    changes: dict[str, Any], defender: DefenderInputs, tmp_path: Path
) -> None:
    assert reused(defender, tmp_path) == []
    assert reused(defender, tmp_path, **changes) == ["ranking"]


@pytest.mark.parametrize("name", INVERSION)
def test_another_setting_of_the_inversion_inverts_again(
    name: str, defender: DefenderInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "LEAST_HELD_OUT", 0)
    monkeypatch.setattr(verdict, "LEAST_MARGIN", -1.0)  # one family is enough

    def read(**changes: Any) -> list[str]:
        stages = Stages()
        select.test_for_backdoor(defender, Settings(**changes), tmp_path, stages)
        return stages.reused

    assert read() == []
    assert read(**{name: INVERSION[name]}) == []
    assert read() == ["trigger inversion"] == read(eps=2 / 255, budget=0.5, p=2)
    assert read(fresh=True) == []


def test_a_fresh_run_ranks_again(defender: DefenderInputs, tmp_path: Path) -> None:
    assert reused(defender, tmp_path) == []
    assert reused(defender, tmp_path) == ["ranking"]
    assert reused(defender, tmp_path, fresh=True) == []
