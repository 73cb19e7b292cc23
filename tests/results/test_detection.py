"""What detectors say about models: read from what they leave, counted, and drawn as ROC curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import collect as script
import pandas as pd
import pytest
import torch
from fmp_core.results.collect import collect
from fmp_core.results.detection import Detection, anomaly, detection_of_neural_cleanse, detection_of_verdict
from fmp_core.results.roc import detection_table, detections, write_roc
from matplotlib.figure import Figure
from result_files import metrics_json, one_row, three_rows, write

NORMS = [60.0, 71.5, 9.25, 66.0, 80.25, 58.5]  # class 2 is the target


def nc_log(norms: list[float]) -> str:
    lines = [f"2026-11-26:15:06:41 [INFO ] The regularization of mask for target label {k} is {v}" for k, v in enumerate(norms)]
    return "\n".join(lines) + f"\n2026-11-26:15:06:41 [INFO ] {len(norms)} labels found\n"


def model(root: Path, name: str, asr: float, pratio: float, norms: list[float], lead: float) -> None:
    """A record with the results of both detectors."""
    folder = root / name
    write(folder / "attack_df_summary.csv", three_rows(0.9, asr, 0.1))
    torch.save({"attack": "badnet", "dataset": "cifar10", "pratio": pratio, "attack_target": 2}, folder / "info.pickle")
    write(folder / "defense" / "nc" / "nc_df_summary.csv", one_row(0.9, 0.1, 0.8))
    write(folder / "defense" / "nc" / "log" / "2026.log", nc_log(norms))
    verdict = {"backdoored": lead >= 0.3, "target": 2, "lead": lead, "too_few": False}
    before = {"test_acc": 0.9, "test_asr": asr, "test_ra": 0.1}
    write(folder / "defense" / "strong" / "metrics.json", metrics_json(0.9, 0.1, 0.8, before=before, verdict=verdict))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    level = [60.0, 71.5, 62.0, 66.0, 80.25, 58.5]
    model(tmp_path, "clean", 0.1, 0.0, level, 0.12)
    model(tmp_path, "clean_too", 0.1, 0.0, [*NORMS[:2], 64.0, *NORMS[3:5], 11.0], 0.2)  # a false alarm of Neural Cleanse
    model(tmp_path, "attacked", 0.97, 0.1, NORMS, 0.8)
    model(tmp_path, "attacked_too", 0.99, 0.1, level, 0.25)  # missed by both
    model(tmp_path, "not_planted", 0.2, 0.1, NORMS, 0.9)
    return tmp_path


def test_the_anomaly_index_is_that_of_the_smallest_norm() -> None:
    norms = torch.tensor(NORMS)
    median = norms.median()
    index = (median - norms.min()) / (1.4826 * (norms - median).abs().median())
    assert anomaly(NORMS) == Detection("Neural Cleanse", pytest.approx(float(index)), True, ("2",))


def test_equal_norms_say_nothing() -> None:
    assert anomaly([5.0, 5.0, 5.0, 1.0]) is None


def test_a_large_norm_is_no_alarm() -> None:
    found = anomaly([60.0, 61.0, 62.0, 63.0, 300.0])
    assert found is not None and not found.flagged and found.named == ()


@pytest.mark.parametrize(
    "log",
    [
        "",
        nc_log(NORMS[:1]),
        nc_log(NORMS).replace("label 3", "label 9"),
        nc_log(NORMS).replace("66.0", "6.6.0"),
        nc_log(NORMS).rsplit("2026", 1)[0],
        "\xff\n",
    ],
    ids=["empty", "one class", "a class lacks", "no number", "killed", "no text"],
)
def test_a_log_without_the_norm_of_every_class_says_nothing(tmp_path: Path, log: str) -> None:
    write(tmp_path / "log" / "x.log", log)
    assert detection_of_neural_cleanse([tmp_path / "log" / "x.log"]) is None


def test_the_first_log_that_is_whole_counts(tmp_path: Path) -> None:
    write(tmp_path / "log" / "2025.log", nc_log(NORMS[::-1]))
    write(tmp_path / "log" / "2026.log", nc_log(NORMS))
    write(tmp_path / "log" / "2027.log", nc_log(NORMS[::-1])[:200])  # killed
    found = detection_of_neural_cleanse([tmp_path / "log" / f"{year}.log" for year in (2027, 2026, 2025)])
    assert found is not None and found.named == ("2",)


@pytest.mark.parametrize(
    "verdict", [{}, {"lead": "0.5"}, {"lead": float("nan")}, {"lead": 10**400}, {"lead": 0.0, "too_few": True}]
)
def test_no_verdict_is_no_detection(verdict: dict[str, Any]) -> None:
    assert detection_of_verdict(verdict) is None


def test_a_verdict_names_its_target_only_if_it_is_above_the_threshold() -> None:
    below = {"backdoored": False, "target": 7, "lead": 0.2986}
    assert detection_of_verdict(below) == Detection("FMP's verdict", 29.86, False, ())
    assert detection_of_verdict({**below, "backdoored": True}) == Detection("FMP's verdict", 29.86, True, ("7",))


def test_models_are_counted_and_drawn(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([str(models), "--roc", str(models / "roc.svg"), "--csv", str(models / "out.csv")]) == 0
    table = [line.split() for line in capsys.readouterr().out.rstrip().splitlines()[-2:]]
    counts = {" ".join(words[:2]): words[2:] for words in table}
    # clean, false alarms, backdoored, missed, target not named, AUC
    assert counts["FMP's verdict"] == ["2", "0", "2", "1", "0", "1.00"]
    assert counts["Neural Cleanse"] == ["2", "1", "2", "1", "0", "0.38"]  # of four pairs one is right and one a tie
    text = (models / "roc.svg").read_text()
    assert text.startswith("<?xml") and "</svg>" in text


def test_a_poisoned_model_without_the_backdoor_is_left_out(models: Path) -> None:
    found = detections(collect(models, lambda text: None))
    assert set(found["record"]) == {"clean", "clean_too", "attacked", "attacked_too"}


def test_only_models_that_every_detector_looked_at_are_compared(models: Path) -> None:
    (models / "attacked" / "defense" / "nc" / "log" / "2026.log").unlink()
    assert "attacked" not in set(detections(collect(models, lambda text: None))["record"])


def test_another_class_than_the_target_is_counted(models: Path) -> None:
    path = models / "attacked" / "defense" / "strong" / "metrics.json"
    content = json.loads(path.read_text())
    content["verdict"]["target"] = 3
    path.write_text(json.dumps(content))
    (words,) = (
        line.split() for line in detection_table(detections(collect(models, lambda text: None))).splitlines() if "FMP" in line
    )
    # clean, false alarms, backdoored, missed, target not named, AUC
    assert words[2:] == ["2", "0", "2", "1", "1", "1.00"]


def test_of_several_runs_that_of_the_first_seed_and_then_the_most_clean_data_counts(models: Path) -> None:
    frame = collect(models, lambda text: None)
    ours = frame["detector"] == "FMP's verdict"
    runs = [(1, 0.1), (0, 0.05), (0, 0.1), (1, 0.2), (0, 0.02)]
    repeated = [frame[ours].assign(seed=seed, ratio=ratio) for seed, ratio in runs]
    found = detections(pd.concat([frame[~ours], *repeated], ignore_index=True))
    of_ours = found[found["detector"] == "FMP's verdict"]
    assert len(of_ours) == 4 and set(zip(of_ours["seed"], of_ours["ratio"], strict=True)) == {(0, 0.1)}


def test_false_alarms_are_drawn_across_and_what_is_found_upwards(models: Path, saved_figures: list[Figure]) -> None:
    write_roc(models / "roc.svg", detections(collect(models, lambda text: None)))
    (axes,) = saved_figures[0].axes
    assert axes.get_xlabel().startswith("false alarms") and axes.get_ylabel().startswith("found")
    (curve,) = (line for line in axes.lines if str(line.get_label()).startswith("FMP's verdict"))
    (threshold,) = (line for line in axes.lines if line.get_color() == curve.get_color() and line is not curve)
    points = curve.get_xydata().tolist()
    assert [0, 1] in points and [1, 0] not in points  # all are found before the first false alarm
    assert threshold.get_xydata().tolist() == [[0, 0.5]]


def test_without_clean_models_there_is_no_curve(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("clean", "clean_too"):
        (models / name / "info.pickle").unlink()
    assert script.main([str(models), "--roc", str(models / "roc.svg")]) == 2
    assert "--roc needs" in capsys.readouterr().err and not (models / "roc.svg").exists()


def test_all_to_all_is_a_target(models: Path) -> None:
    folder = models / "attacked"
    torch.save({"attack": "badnet", "pratio": 0.1, "attack_label_trans": "all2all", "attack_target": 2}, folder / "info.pickle")
    path = folder / "defense" / "strong" / "metrics.json"
    content = json.loads(path.read_text())
    content["verdict"]["target"] = "all-to-all"
    path.write_text(json.dumps(content))
    row = collect(models, lambda text: None).set_index(["record", "defense"]).loc[("attacked", "strong")]
    assert (row["target"], row["named"]) == ("all-to-all", "all-to-all")
