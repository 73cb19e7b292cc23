"""One run of the command, looked at from all sides."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch
from command import FT_COLUMNS, MAPS, QUICK, RESULTS, SHORT, Edit, Run, listing, table, weights
from conftest import MODEL, RECORD, Ran, call_fmp
from fmp import FMP
from fmp_core.inputs import DefenderInputs
from fmp_core.results.read import read_result
from fmp_core.selection.choice import Selection, select_none
from fmp_core.settings import load_settings, unused
from fmp_core.storage.files import file_digest
from narrow_resnet import NARROW_RESNET_MAPS
from PIL import Image


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
    assert words[:8] == ["record", "model", "dataset", "pixels", "clean", "test", "device", "preset"]
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


def test_models_of_epochs_are_all_of_the_last_run(workplace: Path, run_fmp: Run):
    for epochs in ("2", "1"):
        assert run_fmp(*SHORT, "--epochs", epochs, "--frequency_save", "1").code == 0
        saved = sorted(path.name for path in (workplace / RESULTS / "checkpoint").iterdir())
        assert saved == [f"fmp_epoch_{epoch}.pt" for epoch in range(int(epochs))]


def test_models_of_epochs_are_of_the_run_that_the_results_are_of(workplace: Path, run_fmp: Run):
    place, saved = ("--frequency_save", "1", "--epochs", "1", "--checkpoint_save", "saved"), workplace / "saved" / RECORD
    for name in ("fmp", "other"):  # one folder for several runs, as in a settings file
        assert run_fmp(*SHORT, *place, "--defense_name", name).code == 0
    assert all((saved / name / "fmp_epoch_0.pt").exists() for name in ("fmp", "other"))
    assert run_fmp(*SHORT, "--epochs", "0", "--checkpoint_save", "saved").code == 0  # pruning alone has no epochs
    assert not list((saved / "fmp").iterdir()) and list((saved / "other").iterdir())


def test_a_sample_that_leaves_nothing_out_is_none(workplace: Path, run_fmp: Run):
    ran = run_fmp(*SHORT, "--epochs", "0", "--test_images", "1000")
    metrics = json.loads((workplace / RESULTS / "metrics.json").read_text())
    assert metrics["test_images"] is None and "even sample" not in ran.out + ran.err
    assert read_result(workplace / RESULTS).test_images is None


def test_flags_without_effect_and_a_model_that_diverged_are_said(workplace: Path, run_fmp: Run):
    ran = run_fmp(*SHORT, "--budget", "0.2", "--p", "9", "--epochs", "1", "--lr", "1e30", "--steplr_gamma", "0.2")
    assert "--budget has no effect without --selection trigger\n" in ran.err
    assert "--steplr_gamma has no effect without --lr_scheduler StepLR or MultiStepLR\n" in ran.err
    assert ran.err.count("has no effect") == 2
    quick = unused(load_settings({"preset": "strong", "epochs": "0", "distill": "0.5", "batch_size": "8"}))
    assert quick == ["--distill has no effect without --epochs of at least 1"]
    seldom = unused(load_settings({"epochs": "3", "frequency_save": "5"}))
    assert seldom == ["--frequency_save has no effect without --epochs of at least that number"]
    drawn = unused(load_settings({"selection": "none", "masked": "True", "index": "i.txt", "ratio": "0.5"}))
    assert [sentence.split()[0] for sentence in drawn] == ["--ratio", "--masked"]
    assert unused(load_settings({"selection": "none", "p": "9"}), "trigger") == []  # of an ablation, which selects otherwise
    metrics = json.loads((workplace / RESULTS / "metrics.json").read_text())
    assert "Fine-tuning diverged." in metrics["warnings"][0] and metrics["removal"]["outcome"] == "diverged"
    assert "its outputs are not numbers: try a smaller --lr" in ran.out


def test_the_clock_may_jump(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    times = iter(range(10**9, 0, -10_000))
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    assert call_fmp(*SHORT).code == 0
    assert min(json.loads((workplace / RESULTS / "metrics.json").read_text())["seconds"].values()) >= 0


def test_results_name_the_record_that_was_read(workplace: Path):
    """A record that is made again while a defense runs is another one."""
    path = workplace / "record" / RECORD / "attack_result.pt"
    before = file_digest(path)

    def made_again(defender: DefenderInputs, *_: Any) -> Selection:
        path.write_bytes(path.read_bytes() + b"0")
        return select_none(defender.layers)

    metrics = FMP({"epochs": 0, "ratio": 1.0, "device": "cpu"}, made_again).defense(RECORD)["metrics"]
    assert metrics["settings"]["result_file"] == RECORD  # which the report's command repeats
    assert metrics["attack_result"] == before != file_digest(path)


def test_one_object_defends_several_records(workplace: Path, edit_record: Edit) -> None:
    def always_class_0(content: dict[str, Any]) -> None:
        content["model"]["fc.bias"][0] += 100

    shutil.copytree(workplace / "record" / RECORD, workplace / "record" / "other")
    edit_record(workplace / "record" / "other", always_class_0)
    method = FMP({"device": "cpu", "report": False, "epochs": 0, "selection": "none"})
    first, stages = method.defense(RECORD)["metrics"]["before"], method.stages
    second = method.defense("other")["metrics"]["before"]
    assert (first["test_asr"], second["test_asr"], second["test_ra"]) == (0, 1, 0)
    assert method.stages is not stages
