"""The command: one run from record to results, one line and nothing left behind for bad input."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fmp
import pandas as pd
import pytest
import torch
from conftest import MODEL, RECORD, Ran, call_fmp
from fmp_core.errors import UserError
from fmp_core.inputs import DefenderInputs
from fmp_core.inversion import trigger as triggers
from fmp_core.inversion import verdict as verdicts
from fmp_core.inversion.trigger import FAMILIES
from fmp_core.selection.choice import Selection
from fmp_core.settings import PROJECT, Settings
from fmp_core.system.cli import Stages
from hostile import Call
from PIL import Image
from toy import NARROW_RESNET_MAPS

QUICK = ("--result_file", RECORD, "--frg_samples", "2", "--p", "8")
MAPS = sum(NARROW_RESNET_MAPS.values())
RESULTS = Path("record") / RECORD / "defense" / "fmp"
FT_COLUMNS = [
    "epoch",
    "batch",
    "train_epoch_loss_avg_over_batch",
    "train_acc",
    "clean_test_loss_avg_over_batch",
    "bd_test_loss_avg_over_batch",
    "test_acc",
    "test_asr",
    "test_ra",
]
Run = Callable[..., Ran]
Edit = Callable[[Path, Callable[[dict[str, Any]], Any]], None]


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below, with size and time of change."""
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, index_col=0)


def weights(root: Path) -> dict[str, torch.Tensor]:
    return torch.load(root / RESULTS / "defense_result.pt", weights_only=True)["model"]


# One run, looked at from all sides.


class Finished(NamedTuple):
    root: Path
    ran: Ran

    @property
    def results(self) -> Path:
        return self.root / RESULTS

    @property
    def metrics(self) -> dict[str, Any]:
        return json.loads((self.results / "metrics.json").read_text())


@pytest.fixture(scope="module")
def finished(workplace_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """Two epochs, tested after the last only, saved after each."""
    root = tmp_path_factory.mktemp("finished") / "workplace"
    shutil.copytree(workplace_template, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        ran = call_fmp("--device", "cpu", *QUICK, "--epochs", "2", "--frequency_test", "0", "--frequency_save", "1")
    yield Finished(root, ran)


def test_a_run_ends_with_a_table(finished: Finished):
    assert finished.ran.code == 0, finished.ran.err
    lines = finished.ran.out.strip().splitlines()
    assert lines[0].split() == ["percent", "Acc", "ASR", "RA"]
    for line, row in zip(lines[1:3], ("before", "after"), strict=True):
        figures = finished.metrics[row]
        assert line.split() == [row, "FMP", *(f"{100 * figures[key]:.2f}" for key in ("test_acc", "test_asr", "test_ra"))]
    assert f"results: {RESULTS}" in lines[-1] and lines[-1].startswith("DER ")


def test_ten_plain_lines_come_first_then_the_first_figure(finished: Finished):
    """What the run works on, and with what; all else is in the log. The attacked model is tested before anything else."""
    lines = finished.ran.err.splitlines()
    first = next(number for number, line in enumerate(lines) if "Acc " in line)
    assert first <= 10 and lines[first].startswith("before: Acc ")
    words = [line.split()[0] for line in lines[:first]]
    assert words[:7] == ["record", "model", "dataset", "clean", "test", "device", "preset"]
    about = "\n".join(lines[:first])
    for part in (
        RECORD,
        f"{MODEL}, {MAPS} feature maps",
        "cifar10, 10 classes",
        "5 training images",
        "10 clean and 9 poisoned",
    ):
        assert part in about
    assert "frg_samples 2" in about and "p 8" in about and "lr" not in about  # only what differs from the defaults


def test_the_terminal_speaks_in_percent(finished: Finished):
    (line,) = [line for line in finished.ran.err.splitlines() if line.startswith("before: ")]
    figures = finished.metrics["before"]
    assert line == "before: Acc {:.2f} %  ASR {:.2f} %  RA {:.2f} %".format(*(100 * value for value in figures.values()))


def test_a_run_leaves_every_file_of_bbs_and_ours(finished: Finished):
    names = {path.relative_to(finished.results).as_posix() for path in finished.results.rglob("*") if path.is_file()}
    logs = {name for name in names if re.fullmatch(r"log/\d{4}(_\d\d){5}\.log", name)}
    assert len(logs) == 1
    scores = {name for name in names if name.startswith("cache/")}
    assert names - logs - scores == {
        ".lock",
        "defense_result.pt", "fmp_df.csv", "fmp_df_summary.csv", "loss_metric_plots.png", "acc_like_metric_plots.png",
        "log/index.txt", "index.txt", "feature_maps.csv", "metrics.json",
        "predictions.csv", "report.html",
        "checkpoint/fmp_epoch_0.pt", "checkpoint/fmp_epoch_1.pt",
    }  # fmt: skip


def test_a_run_changes_nothing_else(finished: Finished, workplace_template: Path):
    before, after = listing(workplace_template), listing(finished.root)
    added = {name for name in after if name not in before}
    assert set(before) <= set(after) and all(name.startswith(f"record/{RECORD}/defense") for name in added)
    record = Path("record") / RECORD / "attack_result.pt"
    assert (finished.root / record).read_bytes() == (workplace_template / record).read_bytes()


def test_the_csv_has_the_columns_of_fts(finished: Finished):
    text = (finished.results / "fmp_df.csv").read_text()
    assert text.splitlines()[0] == "," + ",".join(FT_COLUMNS)
    frame = table(finished.results / "fmp_df.csv")
    assert frame["epoch"].tolist() == [0, 1] and frame["batch"].tolist() == [1, 1]
    assert frame[["train_epoch_loss_avg_over_batch", "train_acc"]].notna().all(axis=None)


def test_frequency_test_0_tests_after_the_last_epoch_only(finished: Finished):
    frame = table(finished.results / "fmp_df.csv")
    assert frame["test_acc"].isna().tolist() == [True, False]
    assert frame["test_acc"][1] == finished.metrics["after"]["test_acc"]


def test_the_summary_has_bbs_three_rows(finished: Finished):
    history = table(finished.results / "fmp_df.csv")
    summary = table(finished.results / "fmp_df_summary.csv")
    assert summary.index.tolist() == ["last", "valid_max", "exist_nan_value"]
    assert summary.columns.tolist() == FT_COLUMNS
    assert float(summary["train_acc"]["last"]) == history["train_acc"].iloc[-1]
    assert float(summary["train_epoch_loss_avg_over_batch"]["valid_max"]) == history["train_epoch_loss_avg_over_batch"].max()
    assert set(summary.loc["exist_nan_value"]) == {"False"}


def test_the_plots_have_bbs_size(finished: Finished):
    for name in ("loss_metric_plots.png", "acc_like_metric_plots.png"):
        with Image.open(finished.results / name) as image:
            image.load()
            assert image.size == (1280, 960)


def test_feature_maps_csv_has_a_row_per_map(finished: Finished):
    frame = pd.read_csv(finished.results / "feature_maps.csv")
    assert frame.columns.tolist() == ["layer", "channel", "correct", "samples", "margin", "rank", "pruned"]
    sizes = frame.groupby("layer", sort=False).size()
    assert sizes.to_dict() == NARROW_RESNET_MAPS
    assert set(frame["samples"]) == {2} and frame["correct"].between(0, 2).all()
    pruned = frame.groupby("layer", sort=False)["pruned"].sum()
    assert pruned.tolist() == [size // 8 for size in sizes]
    assert (frame["pruned"] == (frame["rank"] <= frame["layer"].map(sizes) // 8)).all()


def test_metrics_json_says_what_was_done(finished: Finished):
    metrics = finished.metrics
    for row in ("before", "after"):
        assert list(metrics[row]) == ["test_acc", "test_asr", "test_ra"]
        assert all(0 <= value <= 1 for value in metrics[row].values())
    drop = {key: max(0.0, metrics["before"][key] - metrics["after"][key]) for key in ("test_acc", "test_asr")}
    assert metrics["der"] == pytest.approx((drop["test_asr"] - drop["test_acc"] + 1) / 2)
    assert (metrics["record"], metrics["dataset"], metrics["model"]) == (RECORD, "cifar10", MODEL)
    assert (metrics["clean_images"], metrics["frg_images"], metrics["feature_maps"]) == (5, 2, MAPS)
    assert metrics["pruned"] == pd.read_csv(finished.results / "feature_maps.csv")["pruned"].sum()
    assert metrics["seed"] == 0 and metrics["device"].startswith("cpu")
    assert metrics["test_images"] is None and metrics["attack_figures"] is None and metrics["warnings"] == []
    assert {"load", "ranking", "testing"} <= set(metrics["seconds"])
    assert all(seconds >= 0 for seconds in metrics["seconds"].values())
    assert metrics["settings"]["p"] == 8 and metrics["settings"]["eps"] == 1 / 255
    assert {"fmp", "git", "python", "torch", "torchvision", "numpy", "pandas"} <= set(metrics["versions"])


def test_the_defense_result_is_a_drop_in_for_the_record(finished: Finished):
    record = torch.load(finished.root / "record" / RECORD / "attack_result.pt", weights_only=False)["model"]
    result = torch.load(finished.results / "defense_result.pt", weights_only=True)
    assert list(result) == ["model_name", "num_classes", "model"]
    assert (result["model_name"], result["num_classes"]) == (MODEL, 10)
    assert list(result["model"]) == list(record)
    for key, value in result["model"].items():
        assert (value.dtype, value.shape, value.device.type) == (record[key].dtype, record[key].shape, "cpu")
    assert any(not torch.equal(value, record[key]) for key, value in result["model"].items())


def test_index_txt_is_the_clean_subset_in_draw_order(finished: Finished):
    drawn = [int(line) for line in (finished.results / "index.txt").read_text().split()]
    assert drawn == [24, 48, 26, 2, 16]  # random.Random(0).sample(range(50), 5)
    assert (finished.results / "log" / "index.txt").read_text() == (finished.results / "index.txt").read_text()


def test_saved_epochs_are_defense_results_and_the_last_is_the_result(finished: Finished):
    epochs = [torch.load(finished.results / "checkpoint" / f"fmp_epoch_{n}.pt", weights_only=True) for n in (0, 1)]
    assert list(epochs[0]) == ["model_name", "num_classes", "model"]
    final = weights(finished.root)
    assert all(torch.equal(epochs[1]["model"][key], value) for key, value in final.items())
    assert any(not torch.equal(epochs[0]["model"][key], value) for key, value in final.items())


def test_the_log_holds_settings_and_all_that_was_said(finished: Finished):
    (log,) = (finished.results / "log").glob("*.log")
    text = log.read_text()
    stamp = r"\d{4}-\d\d-\d\d:\d\d:\d\d:\d\d \[INFO    \] \[\w+\.py:\d+\] "
    assert re.match(stamp, text)
    for part in ("'eps': 0.00392", "'terminal_info'", "before: Acc", "pruned ", "epoch 2 of 2: Acc"):
        assert part in text
    said = [re.sub(stamp, "", line) for line in text.splitlines() if re.match(stamp, line)]
    assert finished.ran.err.splitlines() == said[1:]  # no terminal: the same lines without time and place, no progress bar


def test_a_second_run_gives_the_same_bits(finished: Finished, workplace: Path, run_fmp: Run):
    """Though other poisoned test images and other test frequencies were asked for."""
    for path in (workplace / "record" / RECORD / "bd_test_dataset").rglob("*.png"):
        Image.new("RGB", (32, 32), "red").save(path)
    assert run_fmp(*QUICK, "--epochs", "2", "--frequency_test", "1").code == 0
    again, first = weights(workplace), weights(finished.root)
    assert all(torch.equal(again[key], first[key]) for key in first)
    frame = table(workplace / RESULTS / "fmp_df.csv")
    assert frame["test_acc"].notna().all() and not list((workplace / RESULTS / "checkpoint").iterdir())


# Other ways to run.


def test_epochs_0_prunes_and_evaluates(workplace: Path, run_fmp: Run):
    record = torch.load(workplace / "record" / RECORD / "attack_result.pt", weights_only=False)["model"]
    flags = ("--result_file", RECORD, "--frg_samples", "1", "--p", "9", "--epochs", "0", "--eps", "2/255", "--scope", "global")
    ran = run_fmp(*flags)
    assert ran.code == 0 and ran.err.count("\npruned: Acc") == 1
    frame = table(workplace / RESULTS / "fmp_df.csv")
    assert frame.columns.tolist() == FT_COLUMNS and len(frame) == 1
    assert frame["train_acc"].isna().all() and frame["test_acc"].notna().all()
    maps = pd.read_csv(workplace / RESULTS / "feature_maps.csv")
    chosen = maps[maps["pruned"]]
    assert sorted(chosen["rank"]) == list(range(1, MAPS // 9 + 1))
    expected = {key: value.clone() for key, value in record.items()}
    for layer, channel in zip(chosen["layer"], chosen["channel"], strict=True):
        norm = f"{layer[:-1]}1" if "downsample" in layer else layer.replace("conv", "bn")
        for key in (f"{layer}.weight", f"{norm}.weight", f"{norm}.bias"):
            expected[key][channel] = 0
    result = weights(workplace)
    assert all(torch.equal(result[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("selection", "pruned"), [("random", [size // 8 for size in NARROW_RESNET_MAPS.values()]), ("none", [0] * 6)]
)
def test_ablations_rank_nothing_and_lie_beside_the_result(selection: str, pruned: list[int], workplace: Path, run_fmp: Run):
    """A model that is not changed is not tested twice, either."""
    ran = run_fmp(*QUICK, "--epochs", "0", "--selection", selection, "--defense_name", f"by_{selection}")
    assert ran.code == 0 and "ranking" not in ran.err
    assert ran.err.count(": Acc ") == (2 if any(pruned) else 1)
    folder = workplace / RESULTS.with_name(f"by_{selection}")
    assert (folder / "defense_result.pt").is_file() and not (workplace / RESULTS).exists()
    maps = pd.read_csv(folder / "feature_maps.csv")
    assert list(maps.columns) == ["layer", "channel", "pruned"]
    assert maps.groupby("layer", sort=False)["pruned"].sum().tolist() == pruned
    metrics = json.loads((folder / "metrics.json").read_text())
    if not any(pruned):
        record = torch.load(workplace / "record" / RECORD / "attack_result.pt", weights_only=False)["model"]
        result = torch.load(folder / "defense_result.pt", weights_only=True)["model"]
        assert all(torch.equal(result[key], value) for key, value in record.items())
        assert metrics["after"] == metrics["before"]
        assert table(folder / "fmp_df.csv")["test_acc"].tolist() == [metrics["after"]["test_acc"]]


def test_racing_prunes_what_exact_ranking_prunes(workplace: Path, run_fmp: Run):
    flags = (*QUICK, "--epochs", "0", "--frg_samples", "6", "--dtype", "fp32", "--ratio", "0.2")
    assert run_fmp(*flags).code == 0
    exact = pd.read_csv(workplace / RESULTS / "feature_maps.csv")
    ran = run_fmp(*flags, "--ranking", "racing")
    assert ran.code == 0 and "read from" not in ran.err
    raced = pd.read_csv(workplace / RESULTS / "feature_maps.csv")
    assert raced["pruned"].equals(exact["pruned"])
    scored = raced["margin"].notna()
    assert 0 < int(scored.sum()) < len(raced) and raced["pruned"][scored].sum() == raced["pruned"].sum()
    assert raced["margin"][scored].equals(exact["margin"][scored])
    again = run_fmp(*flags, "--ranking", "racing")
    assert again.code == 0 and "read from" in again.err
    assert pd.read_csv(workplace / RESULTS / "feature_maps.csv").equals(raced)


def test_the_strong_preset_gives_a_verdict_and_flags_override_it(
    workplace: Path, run_fmp: Run, monkeypatch: pytest.MonkeyPatch
):
    for name, fewer in (("STEPS", 3), ("SPARSE_BATCH", 8), ("DENSE_BATCH", 8)):
        monkeypatch.setattr(triggers, name, fewer)
    strong = (*QUICK, "--preset", "strong", "--epochs", "0", "--dtype", "fp32")
    ran = run_fmp(*strong)
    assert ran.code == 0 and "held-out clean images are too few to tell" in ran.err
    assert json.loads((workplace / RESULTS / "metrics.json").read_text())["verdict"]["too_few"]
    monkeypatch.setattr(verdicts, "LEAST_HELD_OUT", 1)
    assert run_fmp(*strong).code == 0
    found = json.loads((workplace / RESULTS / "metrics.json").read_text())
    assert found["settings"]["selection"] == "trigger" and found["settings"]["masked"] and found["settings"]["dtype"] == "fp32"
    assert found["settings"]["frg_samples"] == 2  # a flag
    verdict = found["verdict"]
    best, next_best = sorted(verdict["success"])[:-3:-1]
    assert verdict["family"] in FAMILIES and verdict["lead"] == pytest.approx(best - next_best, abs=1e-3)
    assert (
        verdict["backdoored"]
        == (verdict["lead"] >= verdicts.LEAST_MARGIN)
        == (workplace / RESULTS / "reversed_trigger.pt").exists()
    )


def test_the_class_takes_another_selection(workplace: Path):
    """The one extension point: ablations and other methods select, all else stays."""
    given: list[Any] = []

    def first_map(defender: DefenderInputs, settings: Settings, cache: Path, stages: Stages) -> Selection:
        given.extend([defender, settings.p, cache])
        mask = torch.zeros(MAPS, dtype=torch.bool)
        mask[0] = True
        return Selection(mask, selected_by="a test")

    method = fmp.FMP({"device": "cpu", "report": False, "epochs": 0, "p": 9}, select=first_map)
    metrics = method.defense(RECORD)["metrics"]
    assert (metrics["pruned"], metrics["chosen_by"], metrics["frg_images"]) == (1, "a test", 0)
    assert given[1:] == [9, RESULTS]
    tensors = {field.name: getattr(given[0], field.name) for field in dataclasses.fields(given[0])}
    assert {name for name, value in tensors.items() if isinstance(value, torch.Tensor)} == {"images", "labels"}
    assert len(tensors["images"]) == 5 and not hasattr(given[0], "test")  # of the poisoned test set it knows nothing
    before = torch.load(workplace / "record" / RECORD / "attack_result.pt", weights_only=False)["model"]
    changed = {key for key, value in weights(workplace).items() if not torch.equal(value, before[key])}
    assert changed == {"conv1.weight", "bn1.weight"}  # bn1.bias was 0 already


def test_a_quick_look_tests_an_even_sample_and_says_so(workplace: Path, run_fmp: Run):
    flags = (*QUICK, "--selection", "none", "--epochs", "0")
    assert run_fmp(*flags).code == 0
    whole = pd.read_csv(workplace / RESULTS / "predictions.csv")
    ran = run_fmp(*flags, "--test_images", "5")
    assert ran.code == 0
    assert "5 clean and 5 poisoned (--test_images 5" in ran.err and "even sample of 5 images" in ran.out
    metrics = json.loads((workplace / RESULTS / "metrics.json").read_text())
    assert metrics["test_images"] == 5 == metrics["settings"]["test_images"]
    part = pd.read_csv(workplace / RESULTS / "predictions.csv")
    assert part["poisoned"].sum() == 5 == (~part["poisoned"]).sum()
    assert part.loc[~part["poisoned"], "label"].tolist() == [0, 2, 4, 6, 8]  # ten images, one of each class
    merged = part.merge(whole, how="left", indicator=True)  # the same predictions as of the whole sets
    assert set(merged["_merge"]) == {"both"}
    assert run_fmp(*flags, "--test_images", "1000").code == 0
    assert pd.read_csv(workplace / RESULTS / "predictions.csv").equals(whole)


def test_results_may_lie_outside_a_read_only_record(workplace: Path, run_fmp: Run):
    before = listing(workplace / "record")
    ran = run_fmp(*QUICK, "--epochs", "0", "--save_folder", "elsewhere")
    folder = workplace / "elsewhere" / RECORD / "defense" / "fmp"
    assert ran.code == 0 and f"results: {folder.relative_to(workplace)}" in ran.out
    assert {"metrics.json", "defense_result.pt", "fmp_df.csv", "cache", "log"} <= set(os.listdir(folder))
    assert listing(workplace / "record") == before


def test_mean_and_std_are_the_models_own_preprocessing(workplace: Path, run_fmp: Run, edit_record: Edit):
    """A first convolution that undoes another normalisation: with that one given, the model sees what it saw before."""
    flags = (*QUICK, "--selection", "none", "--epochs", "0")

    def losses() -> list[float]:
        assert ran.code == 0, ran.err
        columns = ["clean_test_loss_avg_over_batch", "bd_test_loss_avg_over_batch"]
        return [float(value) for value in table(workplace / RESULTS / "fmp_df.csv")[columns].iloc[0]]

    ran = run_fmp(*flags)
    usual = losses()
    ran = run_fmp(*flags, "--mean", "0.5", "--std", "0.25")
    assert losses() != usual
    ran = run_fmp(*flags, "--mean", "0.4914,0.4822,0.4465", "--std", "0.247,0.243,0.261")  # cifar10's
    assert losses() == usual
    ran = run_fmp(*flags, "--mean", "0.5", "--std", "0.25")
    quarter = losses()

    def quadruple(content: dict[str, Any]) -> None:
        content["model"]["conv1.weight"] *= 4  # a power of two: the same bits from pixels that are not divided by 0.25

    edit_record(workplace / "record" / RECORD, quadruple)
    ran = run_fmp(*flags, "--mean", "0.5", "--std", "1")
    assert losses() == quarter


def test_a_model_that_does_not_do_what_the_attack_said_is_warned_of(workplace: Path, run_fmp: Run):
    """Perhaps its preprocessing is another one, or the data are."""
    flags = (*QUICK, "--selection", "none", "--epochs", "0")
    assert run_fmp(*flags).code == 0
    before = json.loads((workplace / RESULTS / "metrics.json").read_text())["before"]
    path = workplace / "record" / RECORD / "attack_df_summary.csv"

    def told(**figures: float) -> tuple[Ran, dict[str, Any]]:
        path.write_text(f",test_acc,test_asr,test_ra\nlast,{','.join(str(figures[name]) for name in before)}\n")
        ran = run_fmp(*flags)
        assert ran.code == 0
        return ran, json.loads((workplace / RESULTS / "metrics.json").read_text())

    ran, metrics = told(**before)
    assert metrics["attack_figures"] == pytest.approx(before) and metrics["warnings"] == []
    ran, metrics = told(**{**before, "test_acc": before["test_acc"] + 0.5})
    (warning,) = metrics["warnings"]
    acc = f"Acc {100 * before['test_acc']:.1f} % here, {100 * before['test_acc'] + 50:.1f} % there"
    assert acc in warning and "attack_df_summary.csv" in warning and "--mean" in warning and "ASR" not in warning
    assert warning in ran.err  # on the terminal and in the log, too
    path.write_text("\0")
    assert run_fmp(*flags).code == 0  # it is not ours to refuse
    (warning,) = json.loads((workplace / RESULTS / "metrics.json").read_text())["warnings"]
    assert "attack_df_summary.csv" in warning


def test_the_class_runs_from_python_on_another_place(
    workplace_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit_record: Edit
):
    shutil.copytree(workplace_template / "record" / RECORD, tmp_path / "moved" / "renamed")
    (tmp_path / "index.txt").write_text("7\n30\n49\n")

    def as_data_parallel_half(content: dict[str, Any]) -> None:
        content["model"] = {f"module.{key}": value.half() for key, value in content["model"].items()}
        content["bd_train"] = None

    edit_record(tmp_path / "moved" / "renamed", as_data_parallel_half)
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(
        record_root=str(tmp_path / "moved"),
        dataset_path=str(workplace_template / "data"),
        device="cpu",
        index="index.txt",
        frg_samples=1,
        epochs=1,
        dataset="cifar10",
        model=MODEL,
        num_classes=10,
        log=str(tmp_path / "logs"),
    )
    outcome = fmp.FMP(args).defense("renamed")
    assert isinstance(outcome["model"], torch.nn.Module) and not outcome["model"].training
    written = json.loads((tmp_path / "moved" / "renamed" / "defense" / "fmp" / "metrics.json").read_text())
    assert written["after"] == outcome["metrics"]["after"] and written["clean_images"] == 3
    result = torch.load(tmp_path / "moved" / "renamed" / "defense" / "fmp" / "defense_result.pt", weights_only=True)["model"]
    assert {value.dtype for value in result.values()} == {torch.float16}
    assert not any(key.startswith("module.") for key in result)
    own = outcome["model"].state_dict()
    assert all(torch.equal(own[key].half(), value) for key, value in result.items())
    assert sorted(path.name for path in (tmp_path / "logs").iterdir())[-1] == "index.txt"
    assert sorted(os.listdir(tmp_path)) == ["index.txt", "logs", "moved"]


def test_an_interrupt_before_anything_is_read_is_one_sentence(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fmp, "choose_device", interrupted)
    ran = call_fmp("--result_file", RECORD, "--device", "cpu")
    said = "fmp: interrupted; earlier results are unchanged. Run the same command again to go on from here."
    assert ran.code == 130 and ran.err.splitlines() == [said]


def test_the_class_refuses_what_the_command_refuses(workplace: Path):
    with pytest.raises(UserError, match="--eps is 0"):
        fmp.FMP(argparse.Namespace(eps=0))
    with pytest.raises(UserError, match="'epochz' is not a setting"):
        fmp.FMP({"epochz": 3})
    with pytest.raises(UserError, match="gone does not exist"):
        fmp.FMP({"device": "cpu"}).defense("gone")


def test_without_a_record_the_command_lists_them(workplace: Path, run_fmp: Run):
    shutil.copytree(workplace / "record" / RECORD, workplace / "record" / "another")
    before = listing(workplace)
    ran = run_fmp()
    assert ran.code == 2 and ran.err == ""
    for line in ("--result_file another", f"--result_file {RECORD}", "python record_scripts/make_record.py", "make demo"):
        assert line in ran.out
    assert listing(workplace) == before


def test_without_any_record_the_command_says_how_to_make_one(workplace: Path, run_fmp: Run):
    ran = run_fmp("--record_root", "nowhere")
    assert ran.code == 2
    assert "There are no attack records in nowhere" in ran.out and "make_record.py" in ran.out


def test_help_names_every_flag(run_fmp: Run):
    ran = run_fmp("--help")
    assert ran.code == 0
    for flag in ("--result_file", "--yaml_path", "--eps", "--p", "--scope", "--ratio", "--frequency_save", "-pm"):
        assert flag in ran.out
    assert "VALUE" not in ran.out
    for stage in ("ranking feature maps (FRG)", "fine-tuning", "testing"):
        assert f"\n{stage}:\n" in ran.out


# Bad input: one sentence, exit code 2, no files.


def set_to(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.__setitem__(key, value)


def truncate(root: Path, edit: Edit) -> None:
    path = root / "record" / RECORD / "attack_result.pt"
    path.write_bytes(path.read_bytes()[:-10_000])


def empty(root: Path, edit: Edit) -> None:
    shutil.rmtree(root / "record" / RECORD)
    (root / "record" / RECORD).mkdir()


def hostile(root: Path, edit: Edit) -> None:
    edit(root / "record" / RECORD, set_to("epoch", Call(os.mkdir, "pwned")))


def lose_images(root: Path, edit: Edit) -> None:
    shutil.rmtree(root / "record" / RECORD / "bd_test_dataset" / "3")


def break_image(root: Path, edit: Edit) -> None:
    next((root / "record" / RECORD / "bd_test_dataset" / "3").iterdir()).write_bytes(b"no image")


def lose_data(root: Path, edit: Edit) -> None:
    shutil.rmtree(root / "data")


def lose_batch(root: Path, edit: Edit) -> None:
    (root / "data" / "cifar10" / "cifar-10-batches-py" / "test_batch").unlink()


def shuffle_labels(root: Path, edit: Edit) -> None:
    path = root / "data" / "cifar10" / "cifar-10-batches-py" / "test_batch"
    batch = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps({**batch, "labels": batch["labels"][::-1]}, protocol=2))


def eleven_classes(root: Path, edit: Edit) -> None:
    edit(root / "record" / RECORD, set_to("num_classes", 11))


def another_model(root: Path, edit: Edit) -> None:
    edit(root / "record" / RECORD, set_to("model_name", "resnet18"))


def unknown_model(root: Path, edit: Edit) -> None:
    edit(root / "record" / RECORD, set_to("model_name", "senet18"))


def another_dataset(root: Path, edit: Edit) -> None:
    edit(root / "record" / RECORD, set_to("clean_data", "cifar100"))


def lose_weights(root: Path, edit: Edit) -> None:
    edit(root / "record" / RECORD, lambda content: content["model"].popitem())


def toys_with_too_few_classes(root: Path, edit: Edit) -> None:
    for part in ("train", "test"):
        for label in range(12):
            file = root / "data" / "toys" / part / f"{label:02d}" / "a.png"
            file.parent.mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(file)
    edit(root / "record" / RECORD, set_to("clean_data", "toys"))


BAD_FILES: dict[str, tuple[Callable[[Path, Edit], None], str]] = {
    "truncated record": (truncate, "attack_result.pt is not a whole torch file"),
    "empty folder": (empty, "holds no attack_result.pt"),
    "foreign global": (hostile, "posix.mkdir"),
    "poisoned images missing": (lose_images, "1 of 9 poisoned test images are missing"),
    "poisoned image broken": (break_image, "3.png cannot be decoded"),
    "data folder missing": (lose_data, "Dataset folder data/cifar10 does not exist"),
    "data file missing": (lose_batch, "test_batch is missing"),
    "test set in another order": (shuffle_labels, "only 0 are those of the clean test images at these positions"),
    "wrong num_classes": (eleven_classes, "the record's model_name or num_classes is wrong"),
    "wrong model": (another_model, "lacks the weights layer1.1.conv1.weight of resnet18"),
    "unknown model": (unknown_model, "Model 'senet18' is not one of BackdoorBench's"),
    "wrong dataset": (another_dataset, "Dataset folder data/cifar100 does not exist"),
    "weights missing": (lose_weights, "lacks the weights fc.bias"),
    "labels beyond the model": (toys_with_too_few_classes, "labelled up to 11"),
}
BAD_FLAGS: dict[tuple[str, ...], str] = {
    ("--result_file", "gone"): "Record folder record/gone does not exist",
    ("--eps", "0"): "--eps is '0'",
    ("--ratio", "1.5"): "--ratio is '1.5'",
    ("--ratio", "0.001"): "--ratio 0.001 of 50 clean training images",
    ("--p", "0"): "--p is '0'",
    ("--amp", "ture"): "--amp is 'ture'",
    ("--scope", "all"): "--scope is 'all'",
    ("--device", "cuda:9"): "--device cuda:9",
    ("--device", "gpu"): "--device gpu is not a device",
    ("--dataset", "gtsrb"): "dataset is set to gtsrb, but the record in record/badnet_tiny has cifar10",
    ("--model", "resnet18"): f"model is set to resnet18, but the record in record/badnet_tiny has {MODEL}",
    ("--num_classes", "43"): "num_classes is set to 43, but the record in record/badnet_tiny has 10",
    ("--yaml_path", "config/defense/fmp/gtsrb.yaml"): "dataset is set to gtsrb",
    ("--yaml_path", "gone.yaml"): "--yaml_path gone.yaml does not exist",
    ("--yaml_path", "unknown.yaml"): "unknown key 'epsilon'",
    ("--dataset_path", "elsewhere"): "Dataset folder elsewhere/cifar10 does not exist",
    ("--index", "gone.txt"): "--index gone.txt cannot be read",
    ("--index", "large.txt"): "names image 50",
    ("--epsilon", "1"): "unrecognized arguments: --epsilon 1",
    ("--frg", "3"): "unrecognized arguments: --frg 3",
    ("--eps",): "argument --eps: expected one argument",
    ("stray",): "unrecognized arguments: stray",
}


def refuses(ran: Ran, says: str) -> None:
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("fmp: ") and ran.err.endswith("\n") and ran.err.count("\n") == 1
    assert "Traceback" not in ran.err
    assert says in ran.err


@pytest.mark.parametrize("damage, says", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_files_end_in_one_line_and_leave_nothing(
    damage: Callable[[Path, Edit], None], says: str, workplace: Path, run_fmp: Run, edit_record: Edit
):
    damage(workplace, edit_record)
    before = listing(workplace)
    refuses(run_fmp(*QUICK), says)
    assert listing(workplace) == before


@pytest.mark.parametrize("flags, says", BAD_FLAGS.items(), ids=[" ".join(flags) for flags in BAD_FLAGS])
def test_bad_flags_end_in_one_line_and_leave_nothing(flags: tuple[str, ...], says: str, workplace: Path, run_fmp: Run):
    (workplace / "unknown.yaml").write_text("epsilon: 1/255\n")
    (workplace / "large.txt").write_text("1\n50\n")
    before = listing(workplace)
    refuses(run_fmp(*QUICK, *flags), says)
    assert listing(workplace) == before


def test_an_index_of_one_image_is_too_little_to_fine_tune_and_leaves_nothing(workplace: Path, run_fmp: Run):
    (workplace / "one.txt").write_text("7\n")
    before = listing(workplace)
    refuses(run_fmp(*QUICK, "--frg_samples", "1", "--index", "one.txt"), "at least 2 clean images")
    assert listing(workplace) == before


def test_batches_of_one_image_are_refused_or_trained(workplace: Path, run_fmp: Run):
    assert run_fmp(*QUICK, "--frg_samples", "1", "--epochs", "1", "--batch_size", "1").code in (0, 2)


@pytest.mark.parametrize("flags", [(), ("--log", "index.txt"), ("--checkpoint_save", "index.txt")])
def test_a_folder_that_cannot_be_made_is_one_line(flags: tuple[str, ...], workplace: Path, run_fmp: Run):
    (workplace / "index.txt").write_text("a file")
    if not flags:
        (workplace / "record" / RECORD / "defense").write_text("a file")
    before = listing(workplace)
    refuses(run_fmp(*QUICK, *flags), "cannot be made")
    assert listing(workplace) == before


def test_images_too_small_for_the_model_are_one_line_and_leave_nothing(
    workplace: Path, real_workplace_template: Path, run_fmp: Run, edit_record: Edit
):
    shutil.rmtree(workplace / "record")
    shutil.copytree(real_workplace_template / "record", workplace / "record")
    for part in ("train", "test"):
        for label in range(10):
            file = workplace / "data" / "toys" / part / str(label) / "a.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(file)
    edit_record(workplace / "record" / RECORD, lambda content: content.update(clean_data="toys", img_size=(8, 8, 3)))
    before = listing(workplace)
    refuses(run_fmp(*QUICK, "--ratio", "1"), "cannot take the record's (8, 8, 3) images")
    assert listing(workplace) == before


# As a program, and beside BackdoorBench.


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHONPATH", "COV_"))}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)


def test_the_script_runs_as_a_program_and_prints_one_line(workplace: Path):
    """A wrong flag is told before torch is loaded, which takes seconds; so is ``--help``."""
    before = listing(workplace)
    ran = python("-X", "importtime", str(PROJECT / "defense" / "fmp.py"), *QUICK, "--eps", "0", cwd=workplace)
    said = [line for line in ran.stderr.splitlines(keepends=True) if not line.startswith("import time:")]
    refuses(Ran(ran.returncode, ran.stdout, "".join(said)), "--eps is '0'")
    assert not {line.split("|")[-1].strip() for line in ran.stderr.splitlines()} & {"torch", "pandas", "matplotlib"}
    assert listing(workplace) == before


def test_the_class_is_imported_from_the_repository_root():
    ran = python("-c", "from defense.fmp import FMP; print(FMP.__mro__[1].__module__, FMP({'p': 3}).settings.p)", cwd=PROJECT)
    assert (ran.returncode, ran.stdout.split()) == (0, ["builtins", "3"]), ran.stderr


BASE = """
print("BackdoorBench's base is imported")

class defense(object):
    def __init__(self): print("BB's __init__")
    def add_arguments(parser): print("BB's add_arguments")
    def set_result(self): print("BB's set_result")
    def set_trainer(self): print("BB's set_trainer")
    def set_logger(self): print("BB's set_logger")
    def denoising(self): print("BB's denoising")
    def mitigation(self): print("BB's mitigation")
    def inhibition(self): print("BB's inhibition")
    def defense(self): print("BB's defense")
    def detect(self): print("BB's detect")
"""
ASK = """
import argparse
import defense.base, defense.fmp
parser = argparse.ArgumentParser()
defense.fmp.FMP.add_arguments(parser)
method = defense.fmp.FMP(parser.parse_args(["--p", "9"]))
print(isinstance(method, defense.base.defense), method.settings.p, hasattr(method, "detect"), defense.fmp.__file__)
"""


@pytest.fixture
def checkout(real_workplace_template: Path, tmp_path: Path) -> Path:
    """The shape of a BackdoorBench checkout with our files copied in."""
    root = tmp_path / "BackdoorBench"
    shutil.copytree(real_workplace_template, root)
    (root / "defense").mkdir()
    (root / "defense" / "__init__.py").touch()
    (root / "defense" / "base.py").write_text(BASE)
    shutil.copy(PROJECT / "defense" / "fmp.py", root / "defense")
    shutil.copytree(
        PROJECT / "defense" / "fmp_core", root / "defense" / "fmp_core", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(PROJECT / "config", root / "config")
    return root


def test_beside_backdoorbench_the_class_is_one_of_its_defenses(checkout: Path):
    ran = python("-c", ASK, cwd=checkout)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1].split() == ["True", "9", "True", str(checkout / "defense" / "fmp.py")]


def test_beside_backdoorbench_the_command_runs_like_its_own(checkout: Path):
    flags = ["--result_file", RECORD, "--device", "cpu", "--selection", "random", "--epochs", "0"]
    ran = python("defense/fmp.py", *flags, cwd=checkout)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("BackdoorBench's base is imported\n")
    assert (checkout / RESULTS / "defense_result.pt").is_file()
