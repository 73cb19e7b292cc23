"""Result files in BackdoorBench's conventions, and ours."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RECORD, Ran
from fmp_core.errors import UserError
from fmp_core.frg.scores import Scores
from fmp_core.inversion.trigger import INVERTED_TRIGGER
from fmp_core.models.evaluate import Metrics
from fmp_core.models.feature_maps import ConvLayer
from fmp_core.models.training import Epoch
from fmp_core.results import bb_tables, run_folder
from fmp_core.results.summary import RunSummary, advice, as_table
from fmp_core.selection.choice import Selection, select_lowest
from fmp_core.settings import Settings
from fmp_core.system.versions import versions
from matplotlib.figure import Figure
from PIL import Image
from result_files import three_rows, write
from torch import nn

# The first line of BB's own ft_df.csv and ft_df_summary.csv.
HEADER = (
    ",epoch,batch,train_epoch_loss_avg_over_batch,train_acc,clean_test_loss_avg_over_batch,bd_test_loss_avg_over_batch,"
    "test_acc,test_asr,test_ra"
)
METRICS = Metrics(
    test_acc=0.5, test_asr=0.25, test_ra=0.75, clean_test_loss_avg_over_batch=1.5, bd_test_loss_avg_over_batch=2.5
)
LATER = Metrics(test_acc=0.75, test_asr=0.125, test_ra=0.5, clean_test_loss_avg_over_batch=1.0, bd_test_loss_avg_over_batch=3.0)


def lines(path: Path) -> list[str]:
    text = path.read_bytes().decode()
    assert text.endswith("\n") and "\r" not in text
    return text.splitlines()


def written(folder: Path, rows: list[tuple[Epoch | None, Metrics | None]]) -> tuple[list[str], list[str]]:
    frame = bb_tables.history_frame(rows)
    bb_tables.write_csv(folder / "fmp_df.csv", frame)
    bb_tables.write_csv(folder / "fmp_df_summary.csv", bb_tables.summary_frame(frame))
    return lines(folder / "fmp_df.csv"), lines(folder / "fmp_df_summary.csv")


def test_two_epochs_as_bb_writes_them(tmp_path: Path) -> None:
    table, summary = written(tmp_path, [(Epoch(0, 2, 3.5, 0.1), METRICS), (Epoch(1, 2, 3.25, 0.2), LATER)])
    assert table == [HEADER, "0,0,2,3.5,0.1,1.5,2.5,0.5,0.25,0.75", "1,1,2,3.25,0.2,1.0,3.0,0.75,0.125,0.5"]
    assert summary == [
        HEADER,
        "last,1,2,3.25,0.2,1.0,3.0,0.75,0.125,0.5",
        "valid_max,1,2,3.5,0.2,1.5,3.0,0.75,0.25,0.75",
        "exist_nan_value" + ",False" * 9,
    ]


def test_nan_is_a_word_and_an_untested_epoch_has_empty_cells(tmp_path: Path) -> None:
    rows = [(Epoch(0, 3, math.nan, 0.5), None), (Epoch(1, 3, 2.0, 0.75), METRICS), (Epoch(2, 3, math.nan, 0.25), None)]
    table, summary = written(tmp_path, rows)  # type: ignore[arg-type]
    assert table == [
        HEADER,
        "0,0,3,nan_value,0.5,,,,,",
        "1,1,3,2.0,0.75,1.5,2.5,0.5,0.25,0.75",
        "2,2,3,nan_value,0.25,,,,,",
    ]
    assert summary == [
        HEADER,
        "last,2,3,nan_value,0.25,1.5,2.5,0.5,0.25,0.75",
        "valid_max,2,3,2.0,0.75,1.5,2.5,0.5,0.25,0.75",
        "exist_nan_value,False,False,True,False,False,False,False,False,False",
    ]


def test_only_nan_has_no_maximum(tmp_path: Path) -> None:
    _, summary = written(tmp_path, [(Epoch(0, 3, math.nan, 0.5), METRICS)])
    assert summary[2] == "valid_max,0,3,,0.5,1.5,2.5,0.5,0.25,0.75"


def test_without_epochs_one_row_holds_the_metrics(tmp_path: Path) -> None:
    table, summary = written(tmp_path, [(None, METRICS)])
    assert table == [HEADER, "0,0,0,,,1.5,2.5,0.5,0.25,0.75"]
    assert summary[1] == "last,0,0,,,1.5,2.5,0.5,0.25,0.75"
    assert summary[3].startswith("exist_nan_value,False,False")


def test_floats_are_in_shortest_form(tmp_path: Path) -> None:
    table, _ = written(tmp_path, [(Epoch(0, 2, 0.1 + 0.2, 1 / 3), METRICS)])
    assert table[1].startswith("0,0,2,0.30000000000000004,0.3333333333333333,")


@pytest.mark.parametrize("rows", [[(Epoch(0, 2, 3.5, 0.1), METRICS), (Epoch(1, 2, math.nan, 0.2), None)], [(None, METRICS)]])
def test_plots_are_pictures_of_bbs_size(tmp_path: Path, rows: list[tuple[Epoch | None, Metrics | None]]) -> None:
    bb_tables.write_plots(tmp_path, bb_tables.history_frame(rows))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acc_like_metric_plots.png", "loss_metric_plots.png"]
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert (image.format, image.size) == ("PNG", (1280, 960))
            assert len(image.convert("RGB").getcolors(1280 * 960) or []) > 4  # something is drawn


def test_plots_draw_the_columns_that_their_labels_name(tmp_path: Path, saved_figures: list[Figure]) -> None:
    rows = [(Epoch(0, 2, 3.5, 0.1), METRICS), (Epoch(1, 2, 3.25, 0.2), LATER)]
    bb_tables.write_plots(tmp_path, bb_tables.history_frame(rows))
    loss, accuracy = ({line.get_label(): line.get_xydata().tolist() for line in f.axes[0].lines} for f in saved_figures)
    assert loss == {
        "Train Loss": [[0, 3.5], [1, 3.25]],
        "Test Clean loss": [[0, 1.5], [1, 1.0]],
        "Test Backdoor Loss": [[0, 2.5], [1, 3.0]],
    }
    assert accuracy == {
        "Train Acc": [[0, 0.1], [1, 0.2]],
        "Test C-Acc": [[0, 0.5], [1, 0.75]],
        "Test ASR": [[0, 0.25], [1, 0.125]],
        "Test RA": [[0, 0.75], [1, 0.5]],
    }


def test_what_an_earlier_run_left_and_this_one_does_not_write_is_gone(workplace: Path, run_fmp: Callable[..., Ran]) -> None:
    folder = workplace / "record" / RECORD / "defense" / "fmp"
    folder.mkdir(parents=True)
    for name in ("report.html", INVERTED_TRIGGER):
        (folder / name).write_text("of an earlier run")
    assert run_fmp("--result_file", RECORD, "--selection", "none", "--epochs", "0").code == 0
    assert (folder / "metrics.json").is_file()
    assert not (folder / "report.html").exists() and not (folder / INVERTED_TRIGGER).exists()


def scores() -> Scores:
    layers = (ConvLayer("b", nn.Conv2d(1, 4, 1)), ConvLayer("a", nn.Conv2d(1, 2, 1)))
    margin = torch.tensor([0.5, -1.0, 0.25, 0.125, 0.75, 0.5], dtype=torch.float64)
    return Scores(layers, torch.tensor([7, 3, 3, 9, 8, 1]), margin, margin, samples=10)


def test_feature_maps_ranked_within_their_layer(tmp_path: Path) -> None:
    frame = run_folder.feature_map_frame(scores().layers, select_lowest(scores(), 2, "layer"), "layer")
    bb_tables.write_csv(tmp_path / "feature_maps.csv", frame, index=False)
    assert lines(tmp_path / "feature_maps.csv") == [
        "layer,channel,correct,samples,margin,rank,pruned",
        "b,0,7,10,0.5,3,False",
        "b,1,3,10,-1.0,1,True",
        "b,2,3,10,0.25,2,True",
        "b,3,9,10,0.125,4,False",
        "a,0,8,10,0.75,2,False",
        "a,1,1,10,0.5,1,True",
    ]


def test_feature_maps_ranked_all_together() -> None:
    frame = run_folder.feature_map_frame(scores().layers, select_lowest(scores(), 3, "global"), "global")
    assert frame["rank"].tolist() == [4, 2, 3, 6, 5, 1]
    assert frame["pruned"].tolist() == [False, True, False, False, False, True]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pruned_maps_are_those_of_the_lowest_ranks(scope: str) -> None:
    frame = run_folder.feature_map_frame(scores().layers, select_lowest(scores(), 2, scope), scope)
    for _, group in frame.groupby("layer") if scope == "layer" else [("all", frame)]:
        assert group[group["pruned"]]["rank"].max() < group[~group["pruned"]]["rank"].min()
        assert sorted(group["rank"]) == list(range(1, len(group) + 1))


def test_feature_maps_without_scores_have_no_rank_and_raced_ones_no_margin() -> None:
    layers, mask = scores().layers, torch.arange(6) == 1
    frame = run_folder.feature_map_frame(layers, Selection(mask), "layer")
    assert frame.columns.tolist() == ["layer", "channel", "pruned"] and frame["pruned"].tolist() == mask.tolist()
    change = torch.arange(6).double()
    frame = run_folder.feature_map_frame(layers, Selection(mask, activation_change=change), "layer")
    assert frame.columns.tolist() == ["layer", "channel", "moved", "pruned"] and frame["moved"].tolist() == change.tolist()
    settled = dataclasses.replace(scores(), settled=mask)
    frame = run_folder.feature_map_frame(layers, Selection(mask, scores=settled), "global")
    assert frame["margin"].notna().tolist() == mask.tolist() and frame["margin"][1] == -1.0


def summary(**changes: Any) -> RunSummary:
    """Of a run that removed the backdoor."""
    values: dict[str, Any] = {
        "before": {"test_acc": 0.9123, "test_asr": 1.0, "test_ra": 0.0},
        "after": {"test_acc": 0.9, "test_asr": 0.0123, "test_ra": 0.5},
        "der": 0.98765, "record": "r", "dataset": "d", "model": "m", "clean_images": 5000, "frg_images": 32,
        "feature_maps": 100, "pruned": 1, "tied_at_cut": 0, "verdict": None, "chosen_by": None, "seconds": {}, "seed": 0,
        "device": "cpu", "settings": {"preset": "paper", "epochs": 10}, "versions": {}, "removal": {"outcome": "removed"},
    }  # fmt: skip
    return RunSummary(**{**values, **changes})


def test_the_table_is_in_percent() -> None:
    text = as_table(summary().as_dict(), Path("there"))
    assert [line.split() for line in text.strip().splitlines()[:3]] == [
        ["percent", "Acc", "ASR", "RA"],
        ["before", "FMP", "91.23", "100.00", "0.00"],
        ["after", "FMP", "90.00", "1.23", "50.00"],
    ]
    assert text.splitlines()[-1] == "DER 98.77 %   results: there"  # nothing to advise
    text = as_table(summary(test_images=500).as_dict(), Path("there"))
    assert "even sample of at most 500 images" in text


STILL_WORKS = {"removal": {"outcome": "still works", "certain": True}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"removal": {"outcome": "none before", "certain": True}}, None),
        (STILL_WORKS, "The backdoor still works: try --preset strong."),
        ({"removal": {"outcome": "still works", "certain": False}}, "The backdoor may still work: try --preset strong."),
        ({"removal": {"outcome": "weakened", "certain": True}}, "The backdoor is weakened, not removed: try --preset strong."),
        ({**STILL_WORKS, "settings": {"preset": "strong", "epochs": 10}}, "more clean data (--ratio)"),
        ({**STILL_WORKS, "clean_images": 50}, "50 clean images only: give it more (--ratio"),
        ({"after": {"test_acc": 0.8, "test_asr": 0.0, "test_ra": 0.5}}, "Accuracy fell by 11.2 points: try a smaller --lr"),
        (
            {"after": {"test_acc": 0.8, "test_asr": 0.0, "test_ra": 0.5}, "settings": {"preset": "paper", "epochs": 0}},
            "Accuracy fell by 11.2 points: try a larger --p, or some --epochs",
        ),
        (
            {
                "after": {"test_acc": 0.8, "test_asr": 0.0, "test_ra": 0.5},
                "settings": {"preset": "strong", "epochs": 0},
                "verdict": {"backdoored": True},
            },
            "Accuracy fell by 11.2 points: try a smaller --budget, or some --epochs",
        ),
        ({"after": {"test_acc": 0.89, "test_asr": 0.0, "test_ra": 0.5}}, None),
    ],
)
def test_one_line_of_advice_where_it_is_due(changes: dict[str, Any], said: str | None) -> None:
    lines = advice(summary(**changes).as_dict())
    assert len(lines) == (said is not None)
    assert said is None or said in lines[0]


def test_metrics_json_is_readable_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    written_one = summary(warnings=["w"], settings={"preset": "paper", "path": Path("x")})
    written_one.write(path)
    text = path.read_text()
    assert json.loads(text)["settings"]["path"] == "x" and text.endswith("\n")
    assert list(json.loads(text)) == [field.name for field in dataclasses.fields(RunSummary)]
    again = RunSummary.read(path)
    assert again.as_dict() == {**written_one.as_dict(), "settings": {"preset": "paper", "path": "x"}}
    path.write_text(json.dumps({**json.loads(text), "unknown": 1}))
    assert RunSummary.read(path) == again


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "does not exist"), ("{", "is not JSON"), ("{}", "lacks before"), ("[]", "does not hold a JSON object")],
)
def test_a_damaged_metrics_json_is_one_sentence(content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=f"{said}.*; run the defense again"):
        RunSummary.read(tmp_path / "metrics.json")


def test_versions_name_what_a_result_depends_on() -> None:
    assert versions()["torch"] == torch.__version__
    assert {"fmp", "git", "python", "torchvision", "numpy"} <= versions().keys()
    assert all(isinstance(value, str) and value for value in versions().values())


def test_other_figures_than_the_attacks_are_said_in_either_direction(tmp_path: Path) -> None:
    write(tmp_path / "attack_df_summary.csv", three_rows(0.5, 0.5, 0.5))

    def said(asr: float, sample: int | None = None) -> list[str]:
        return run_folder._compare_with_attack(tmp_path, {"test_acc": 0.5, "test_asr": asr, "test_ra": 0.5}, sample)[1]

    assert said(0.519) == [] and said(0.47)
    assert "ASR 53.0 % here, 50.0 % there" in said(0.53)[0]
    assert said(0.6, 100) == [] and said(0.7, 100)  # a sample of 100 explains 15 points more


def test_records_of_one_name_have_folders_of_their_own(tmp_path: Path) -> None:
    settings = Settings(record_root=str(tmp_path), save_folder=str(tmp_path / "out"), checkpoint_save=str(tmp_path / "epochs"))
    one, other = (run_folder.RunFolder.of(settings, tmp_path / dataset / "badnet") for dataset in ("cifar10", "gtsrb"))
    assert one.path == tmp_path / "out" / "cifar10" / "badnet" / "defense" / "fmp" != other.path
    assert one.checkpoints == tmp_path / "epochs" / "cifar10" / "badnet" / "fmp" != other.checkpoints
    itself = run_folder.RunFolder.of(dataclasses.replace(settings, record_root=str(tmp_path / "badnet")), tmp_path / "badnet")
    assert itself.checkpoints == tmp_path / "epochs" / "badnet" / "fmp"  # --result_file .
