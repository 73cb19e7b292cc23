"""Cuts, ties and marks as the page shows them, against counts made by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from fmp_core.report.data import Trigger
from fmp_core.report.strips import own_pruning, p_table, strips
from made_runs import made_run, scored_maps

COUNTS = {"a": [8, 1, 5, 5, 5, 9, 9, 9], "b": [2] * 16}


def trigger_of(tac: list[float], run) -> Trigger:
    nothing = torch.zeros(0)
    return Trigger(None, run.layers, nothing, nothing, nothing, torch.tensor(tac, dtype=torch.float64))  # type: ignore[arg-type]


def test_cuts_and_ties_of_each_layer() -> None:
    run = made_run(scored_maps(COUNTS), settings={"p": 4})
    tac = [0.0, 9, 8, 7, 1, 1, 1, 1, *range(16, 0, -1)]
    drawn = strips(run, trigger_of(tac, run))
    assert drawn["choices"] == [4, 8, 16] and drawn["own"] == 0  # at 32 no layer has enough maps
    first, second = drawn["layers"]
    assert first["channel"] == [1, 2, 3, 4, 0, 5, 6, 7] and first["correct"] == [1, 5, 5, 5, 8, 9, 9, 9]
    assert first["tac"][:3] == [9, 8, 7] and first["tacRank"][:3] == [1, 2, 3]
    # [pruned, first and last place of the tied, how many, found]
    assert first["cuts"] == [[2, 1, 3, 3, 2], [1, -1, -1, 0, 1], [0, -1, -1, 0, 0]]
    assert second["cuts"] == [[4, 0, 15, 16, 4], [2, 0, 15, 16, 2], [1, 0, 15, 16, 1]]
    table = p_table(run, trigger_of(tac, run))
    assert [(row["p"], row["pruned"], row["tied"], row["precision"].hits) for row in table] == [
        (4, 6, 19, 6),
        (8, 3, 16, 3),
        (16, 1, 16, 1),
    ]
    assert own_pruning(run).mask.nonzero().flatten().tolist() == [1, 2, 8, 9, 10, 11]


def test_all_layers_together_have_one_cut() -> None:
    run = made_run(scored_maps(COUNTS), settings={"p": 16, "scope": "global"})
    drawn = strips(run, None)
    own = drawn["choices"].index(16)
    assert [layer["cuts"][own] for layer in drawn["layers"]] == [[1, -1, -1, 0, None], [0, -1, -1, 0, None]]
    whole = drawn["choices"].index(8)  # 3 of 24: map 1 of a, and two of the sixteen of b
    assert [layer["cuts"][whole][:4] for layer in drawn["layers"]] == [[1, -1, -1, 0], [2, 0, 15, 16]]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_program_s_own_ranks_are_kept(scope: str) -> None:
    """Order and cut come from counts and margins as the csv has them, digits and all."""
    maps = scored_maps({name: np.random.default_rng(1).integers(20, 24, 100).tolist() for name in "abc"}, margins=True)
    expected = maps.assign(layer="all") if scope == "global" else maps
    rank = expected.sort_values(["correct", "margin"]).groupby("layer", sort=False).cumcount().sort_index() + 1
    run = made_run(maps, settings={"p": 8, "scope": scope})
    pruned = rank <= (300 if scope == "global" else 100) // 8
    assert own_pruning(run).mask.tolist() == pruned.tolist()
    for layer in strips(run, None)["layers"]:
        of_layer = maps.assign(rank=rank)[maps["layer"] == layer["name"]].sort_values("rank")
        assert layer["channel"] == of_layer["channel"].tolist()


def test_maps_that_racing_dropped_come_last() -> None:
    maps = scored_maps({"a": [3, 1, 2, 0]})
    maps["margin"] = [0.5, 0.1, 0.2, np.nan]
    layer = strips(made_run(maps, settings={"p": 2}), None)["layers"][0]
    assert layer["channel"] == [1, 2, 0, 3] and layer["margin"] == [0.1, 0.2, 0.5, None] and layer["cuts"][0][:2] == [2, -1]


def test_a_raced_ranking_knows_its_own_cut_only() -> None:
    """The others' would fall among maps whose counts racing predicted."""
    maps = scored_maps({"a": list(range(64))})
    assert strips(made_run(maps, settings={"p": 16}), None)["choices"] == [8, 16, 32, 64]
    maps["margin"] = [0.1] * 10 + [np.nan] * 54
    assert strips(made_run(maps, settings={"p": 16}), None)["choices"] == [16]


def test_maps_selected_by_an_inverted_trigger_have_no_cut_and_no_ties() -> None:
    maps = pd.DataFrame(
        {"layer": "a", "channel": range(4), "moved": [0.1, 0.4, 0.4, 0.2], "pruned": [False, True, True, False]}
    )
    drawn = strips(made_run(maps), None)
    assert drawn["choices"] == [None] and drawn["samples"] == 0
    assert drawn["layers"][0] == {
        "name": "a",
        "channel": [1, 2, 3, 0],
        "change": [0.4, 0.4, 0.2, 0.1],
        "cuts": [[2, -1, -1, 0, None]],
    }
    assert p_table(made_run(maps), None) == []
