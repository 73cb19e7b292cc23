"""Reading results: what makes two of them alike, and which files belong to a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fmp_core.results.collect import collect
from fmp_core.results.read import read_record, read_result
from fmp_core.results.tables import Table, build_tables, to_latex
from fmp_core.settings import load_settings
from fmp_core.storage.files import file_digest
from result_files import metrics_json, one_row, three_rows, write

LOG = "... {{'ratio': 0.1, 'target_layer_name': '{layer}', 'file_name': '{file}',\n 'random_seed': {seed}, ..."


@pytest.mark.parametrize(
    "other",
    [
        {"trigger_seed": 1},
        {"steplr_milestones": [50, 80]},
        {"pos_list": (15, 31)},
        {"selected_layer_param_name": "linear"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_records_of_other_triggers_or_trainings_are_no_seeds_of_one_attack(other: dict[str, Any], tmp_path: Path) -> None:
    first = {"attack": "lf", "trigger_seed": 0, "steplr_milestones": [5, 8], "pos_list": (1, 2)}
    digests = []
    same = {**first, "random_seed": 1, "record_root": "/elsewhere"}
    for name, info in {"a": first, "b": same, "c": {**first, **other}}.items():
        (tmp_path / name).mkdir()
        torch.save({"random_seed": 0, **info}, tmp_path / name / "info.pickle")
        digests.append(read_record(tmp_path / name)["record_digest"])
    assert digests[0] == digests[1] != digests[2]


def test_pruning_decided_by_few_test_images_is_another_setting(tmp_path: Path) -> None:
    for name, summary, alike in (("fp", "finetune", False), ("anp", "anp", False), ("ft", "ft", True)):
        digests = set()
        for seed in (0, 1):
            folder = tmp_path / f"{name}-s{seed}"
            write(folder / f"{summary}_df_summary.csv", three_rows(0.9, 0.5, 0.4))
            write(folder / "log" / "x.log", LOG.format(layer="fc", file="f", seed=seed))
            if seed:
                write(folder / "whole_test.json", json.dumps({"test_acc": 0.9, "test_asr": 0.5, "test_ra": 0.4}))
            digests.add(read_result(folder).settings_digest)
        assert (len(digests) == 1) == alike


def test_how_many_test_images_decided_the_pruning_is_a_setting(tmp_path: Path) -> None:
    digests = []
    for name, images in (("a", 100), ("b", 100), ("c", 500)):
        write(tmp_path / name / "finetune_df_summary.csv", three_rows(0.9, 0.5, 0.4))
        write(tmp_path / name / "log" / "x.log", LOG.format(layer="fc", file="f", seed=0))
        write(tmp_path / name / "whole_test.json", json.dumps({"test_acc": 0.9, "test_asr": 0.5, "test_ra": 0.4}))
        write(tmp_path / name / "run_defense.json", json.dumps({"test_images": images}))
        result = read_result(tmp_path / name)
        digests.append(result.settings_digest)
        assert result.settings["test_images"] == str(images)
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("key", ["load_other_model_path", "checkpoint_path"])
def test_another_model_that_a_defense_starts_from_is_a_setting(tmp_path: Path, key: str) -> None:
    digests = []
    for name, path in (
        ("plain", None), ("none", "None"), ("ft", "'record/r/defense/ft'"), ("seed", "'record/r1/defense/ft'"),
        ("fp", "'record/r/defense/fp'"),
    ):  # fmt: skip
        write(tmp_path / name / "ft_df_summary.csv", three_rows(0.9, 0.5, 0.4))
        given = "" if path is None else f"'{key}': {path},\n "
        write(tmp_path / name / "log" / "x.log", f"{{'ratio': 0.1,\n {given}'random_seed': 0}}\n")
        digests.append(read_result(tmp_path / name).settings_digest)
    assert digests[0] == digests[1] and digests[2] == digests[3] and len(set(digests)) == 3


def test_names_of_layers_are_settings_and_names_of_files_are_not(tmp_path: Path) -> None:
    digests = []
    for name, layer, file in (("a", "fc", "f"), ("b", "fc", "g"), ("c", "layer4", "f")):
        write(tmp_path / name / "npd_df_summary.csv", three_rows(88.0, 7.0, 75.0, head=""))
        write(tmp_path / name / "log" / "x.log", LOG.format(layer=layer, file=file, seed=0))
        digests.append(read_result(tmp_path / name).settings_digest)
    assert digests[0] == digests[1] != digests[2]


def test_seconds_are_of_the_run_that_made_the_model(tmp_path: Path) -> None:
    """BackdoorBench's script, run directly, replaces the model and the table, and not our log."""
    write(tmp_path / "clp_df_summary.csv", one_row(0.8, 0.1, 0.7))
    write(tmp_path / "run_defense.log", "exit code 0 after 68 s; CPU 48 s\n")
    write(tmp_path / "defense_result.pt", "the first")
    write(tmp_path / "run_defense.json", json.dumps({"defense_result": file_digest(tmp_path / "defense_result.pt")}))
    assert read_result(tmp_path).seconds == 68
    write(tmp_path / "defense_result.pt", "another")
    assert read_result(tmp_path).seconds is None
    (tmp_path / "defense_result.pt").unlink()  # tables are copied without models
    assert read_result(tmp_path).seconds == 68


def test_a_record_and_a_link_to_it_are_one(tmp_path: Path) -> None:
    write(tmp_path / "badnet_cifar10" / "defense" / "fmp" / "metrics.json", metrics_json(0.9, 0.1, 0.8))
    for link in ("a", "z"):
        (tmp_path / link).symlink_to(tmp_path / "badnet_cifar10", target_is_directory=True)
    said: list[str] = []
    assert set(collect(tmp_path, said.append)["record"]) == {"badnet_cifar10"}
    assert len(said) == 2 and all(line.endswith("are one record; it is counted once") for line in said)


def test_a_name_breaks_no_line_of_csv(tmp_path: Path) -> None:
    write(tmp_path / "x\rbadnet_cifar10" / "defense" / "fmp" / "metrics.json", metrics_json(0.9, 0.1, 0.8))
    assert set(collect(tmp_path, pytest.fail)["record"]) == {"x?badnet_cifar10"}


def table_of_two_seeds(root: Path, settings: dict[str, Any], commit: str = "1111111") -> Table:
    """The second run has other ``settings`` than the defaults, and is of another commit."""
    for seed, (others, code) in enumerate((({}, "1111111"), (settings, commit))):
        used = dataclasses.asdict(load_settings({"random_seed": seed, **others}))
        text = metrics_json(0.9, 0.1, 0.8, seed=seed, settings=used, versions={"git": code})
        write(root / "badnet_cifar10" / "defense" / f"fmp-s{seed}" / "metrics.json", text)
    (table,) = build_tables(collect(root, pytest.fail))
    return table


def test_our_results_of_other_settings_are_no_seeds_of_one_method(tmp_path: Path) -> None:
    assert table_of_two_seeds(tmp_path, {"lr": 0.02}).methods == ["no defense", "fmp-s0", "fmp-s1"]


@pytest.mark.parametrize("other", [{}, {"report": False}, {"device": "cpu"}], ids=["seed", "report", "device"])
def test_our_results_that_differ_in_what_decides_nothing_are_seeds_of_one_method(other: dict[str, Any], tmp_path: Path) -> None:
    table = table_of_two_seeds(tmp_path, other)
    assert table.methods == ["no defense", "fmp"] and not table.notes


def test_our_results_of_two_commits_have_a_note(tmp_path: Path) -> None:
    table = table_of_two_seeds(tmp_path, {}, commit="2222222")
    assert table.notes == ["Results of different commits of this project are in one row: fmp."]


def test_latex_has_the_titles_of_attacks(tmp_path: Path) -> None:
    write(tmp_path / "a" / "defense" / "fmp" / "metrics.json", metrics_json(0.9, 0.1, 0.8))
    (table,) = build_tables(collect(tmp_path, pytest.fail).assign(attack="ssba_like"))
    assert "SSBA-like" in to_latex(table) and r"ssba\_like" not in to_latex(table)


def test_a_quick_look_parts_no_seeds(tmp_path: Path) -> None:
    used = dataclasses.asdict(load_settings({"random_seed": 2, "test_images": 50}))
    text = metrics_json(0.9, 0.1, 0.8, seed=2, settings=used, test_images=50, versions={"git": "1111111"})
    write(tmp_path / "badnet_cifar10" / "defense" / "fmp-s2" / "metrics.json", text)
    assert table_of_two_seeds(tmp_path, {}).methods == ["no defense", "fmp", "fmp (50 test images)"]


def test_a_baseline_is_ours_where_only_the_attack_success_differs(tmp_path: Path) -> None:
    write(tmp_path / "badnet_cifar10" / "attack_df_summary.csv", three_rows(0.9, 0.98, 0.01))
    before = {"test_acc": 0.9, "test_asr": 0.95, "test_ra": 0.01}
    write(tmp_path / "badnet_cifar10" / "defense" / "fmp" / "metrics.json", metrics_json(0.9, 0.1, 0.8, before=before))
    said: list[str] = []
    rows = collect(tmp_path, said.append).set_index("defense")
    assert len(said) == 1 and rows.loc["fmp", "der"] == pytest.approx((0.95 - 0.1 + 1) / 2)
