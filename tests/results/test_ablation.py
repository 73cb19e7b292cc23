"""record_scripts/ablate.py on a tiny record: rows are real runs, and the oracle takes the maps the trigger moves most."""

from __future__ import annotations

import json
from pathlib import Path

import ablate
import pandas as pd
import pytest
import torch
from fmp_core.inversion import trigger, verdict
from fmp_core.metrics import METRICS
from fmp_core.report.findings import command as report_command

RECORD = "badnet_tiny"
FLAGS = ["--frg_samples", "1", "--p", "8", "--epochs", "1", "--batch_size", "25", "--ratio", "1"]
FLAGS += ["--device", "cpu", "--random_seed", "3"]


def test_rows_are_runs_and_are_not_repeated(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["ft", "random-1", "layer", "oracle", "oracle-pruned"]
    command = ["--result_file", RECORD, "--rows", *rows, "--csv", "rows.csv", *FLAGS]
    assert ablate.main(command) == 0
    frame = pd.read_csv("rows.csv").set_index("row")
    assert list(frame.index) == ["(attacked)", *rows]
    maps = frame["maps"].dropna().astype(int).to_dict()
    assert maps["ft"] == 0 and maps["random-1"] == maps["layer"] == maps["oracle"] == maps["oracle-pruned"] > 0
    assert frame["precision"]["oracle"] == frame["precision"]["oracle-pruned"] == 1
    assert frame["precision"]["random-1"] < 0.5 and frame["precision"]["layer"] < 1
    folder = workplace / "record" / RECORD / "defense"
    for row in rows:
        assert json.loads((folder / f"ablate-{row}" / "metrics.json").read_text())["pruned"] == maps[row]
        assert (folder / f"ablate-{row}" / "index.txt").read_text() == (folder / "ablate-ft" / "index.txt").read_text()
    stamps = {row: (folder / f"ablate-{row}" / "metrics.json").stat().st_mtime_ns for row in rows}
    assert ablate.main(command) == 0
    assert stamps == {row: (folder / f"ablate-{row}" / "metrics.json").stat().st_mtime_ns for row in rows}
    assert "oracle-pruned" in capsys.readouterr().out
    path = folder / "ablate-ft" / "metrics.json"  # the first row: (attacked) is what it was before
    content = json.loads(path.read_text())
    for when, figures in (("before", (0.9, 0.95, 0.05)), ("after", (0.8, 0.1, 0.7))):
        content[when] = dict(zip(METRICS, figures, strict=True))
    path.write_text(json.dumps(content))
    assert ablate.main(command) == 0
    shown = pd.read_csv("rows.csv").set_index("row")[["Acc", "ASR", "RA"]]
    assert shown.loc[["(attacked)", "ft"]].to_numpy().tolist() == [[90, 95, 5], [80, 10, 70]]
    metrics = json.loads((folder / "ablate-oracle" / "metrics.json").read_text())
    assert "record_scripts/ablate.py --rows oracle " in report_command(metrics["settings"], metrics["chosen_by"])


def test_another_model_under_the_same_name_is_run_again(workplace: Path) -> None:
    command = ["--result_file", RECORD, "--rows", "ft", *FLAGS, "--save_folder", "out"]
    assert ablate.main(command) == 0
    path = workplace / "out" / RECORD / "defense" / "ablate-ft" / "metrics.json"
    first = json.loads(path.read_text())
    attack_file = workplace / "record" / RECORD / "attack_result.pt"
    content = torch.load(attack_file, weights_only=False)
    content["model"] = {name: value.flip(0) for name, value in content["model"].items()}
    torch.save(content, attack_file)
    assert ablate.main(command) == 0
    second = json.loads(path.read_text())
    assert second["attack_result"] != first["attack_result"] == first["attack_result"].lower()
    path.write_text("{")
    assert ablate.main(command) == 0 and json.loads(path.read_text())["after"] == second["after"]


def test_a_row_of_other_flags_is_run_again(workplace: Path) -> None:
    command = ["--result_file", RECORD, "--rows", "ft", *FLAGS, "--epochs", "0", "--lr"]
    path = workplace / "record" / RECORD / "defense" / "ablate-ft" / "metrics.json"
    for lr in ("0.01", "0.02"):
        assert ablate.main([*command, lr]) == 0
        assert json.loads(path.read_text())["settings"]["lr"] == float(lr)


def test_fewer_test_images_are_an_even_sample_and_lie_beside_the_others(workplace: Path) -> None:
    flags = ["--result_file", RECORD, "--rows", "oracle-pruned", "random-1", *FLAGS]
    assert ablate.main([*flags, "--epochs", "0", "--csv", "whole.csv"]) == 0
    assert ablate.main([*flags, "--epochs", "0", "--csv", "part.csv", "--test_images", "5"]) == 0
    folder = workplace / "record" / RECORD / "defense"
    whole, part = (pd.read_csv(folder / f"ablate-random-1{only}" / "predictions.csv") for only in ("", "-5"))
    merged = part.merge(whole, how="left", indicator=True)  # of the same images the same predictions
    assert set(merged["_merge"]) == {"both"} and len(part) == 10 < len(whole)
    before = pd.read_csv("part.csv").set_index("row").loc["(attacked)"]
    poisoned = part[part["poisoned"]]
    assert before["ASR"] == round(100 * (poisoned["before"] == poisoned["target"]).mean(), 2)
    metrics = json.loads((folder / "ablate-random-1-5" / "metrics.json").read_text())
    again = report_command(metrics["settings"], metrics["chosen_by"])
    assert "ablate.py --rows random-1 " in again and "--test_images 5" in again


def test_rows_of_strong_lack_one_part_each(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fewer in (("STEPS", 2), ("SPARSE_BATCH", 8), ("DENSE_BATCH", 8)):
        monkeypatch.setattr(trigger, name, fewer)
    monkeypatch.setattr(verdict, "LEAST_HELD_OUT", 0)
    monkeypatch.setattr(verdict, "LEAST_MARGIN", -1.0)  # whatever the model, a trigger is inverted
    parts = ("moved", "unpruned", "random", "unmasked", "clean", "undistilled", "uninterpolated")
    rows = ["strong", *(f"strong-{part}" for part in parts)]
    assert ablate.main(["--result_file", RECORD, "--rows", *rows, *FLAGS]) == 0
    folder = workplace / "record" / RECORD / "defense"
    metrics = {row: json.loads((folder / f"ablate-{row}" / "metrics.json").read_text()) for row in rows}
    whole = metrics["strong"]["settings"]
    lacking = {"unmasked": "masked", "clean": "unlearn", "undistilled": "distill", "uninterpolated": "interpolate"}
    for row, lacks in lacking.items():
        theirs = metrics[f"strong-{row}"]["settings"]
        assert {name for name in whole if whole[name] != theirs[name]} == {lacks, "defense_name"} and not theirs[lacks]
    for row in ("strong-unpruned", "strong-random"):
        assert {name for name in whole if whole[name] != metrics[row]["settings"][name]} == {"defense_name"}
    unpruned = metrics["strong-unpruned"]
    again = report_command(unpruned["settings"], unpruned["chosen_by"])
    assert "ablate.py --rows strong-unpruned --result_file" in again and "--preset" not in again and "--lr" not in again
    assert unpruned["pruned"] == 0
    drawn, meant = (
        pd.read_csv(folder / f"ablate-{row}" / "feature_maps.csv").groupby("layer")["pruned"].sum()
        for row in ("strong-random", "strong")
    )
    assert drawn.equals(meant) and drawn.any()
    moved, strong = (pd.read_csv(folder / f"ablate-{row}" / "feature_maps.csv") for row in ("strong-moved", "strong"))
    for layer, maps in strong.groupby("layer"):
        most = maps.nlargest(len(maps) // metrics["strong"]["settings"]["p"], "moved").index
        assert sorted(most) == list(moved.index[(moved["layer"] == layer) & moved["pruned"]])


def test_where_no_target_is_named_rows_of_strong_change_what_strong_then_prunes(workplace: Path) -> None:
    """The record has too few clean images for a verdict, and FRG selects."""
    rows = ["strong", "strong-random", "strong-unpruned", "strong-moved"]
    assert ablate.main(["--result_file", RECORD, "--rows", *rows, *FLAGS]) == 0
    folder = workplace / "record" / RECORD / "defense"
    masks = {row: pd.read_csv(folder / f"ablate-{row}" / "feature_maps.csv").groupby("layer")["pruned"] for row in rows}
    strong, drawn, unpruned, moved = (mask.sum() for mask in masks.values())
    assert strong.any() and drawn.equals(strong) and not unpruned.any()
    assert moved.equals(strong) and not masks["strong-random"].obj.equals(masks["strong"].obj)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--result_file", "absent"], "absent"),
        (["--result_file", RECORD, "--rows", "nothing"], "--rows"),
        (["--result_file", RECORD, "--eps", "x"], "eps"),
        (["--result_file", RECORD, "--test_images", "0"], "--test_images"),
        (["--result_file", RECORD, "--scope", "global"], "--scope is set by each row of the ablation"),
    ],
)
def test_bad_input_is_one_sentence(workplace: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    try:
        code = ablate.main(flags)
    except SystemExit as stop:
        code = int(stop.code or 0)
    err = capsys.readouterr().err
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1
