"""What a report says in words."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from fmp_core.metrics import METRICS
from fmp_core.models.activation_change import Precision
from fmp_core.report.findings import command, headline, warnings
from fmp_core.report.page import page
from fmp_core.report.strips import own_pruning
from fmp_core.results.intervals import Interval
from fmp_core.results.removal import NOT_TESTED, attack_outcome
from fmp_core.settings import Settings, add_arguments, load_settings
from fmp_core.system.cli import Parser
from made_runs import made_run, predictions, scored_maps

APART, TIED = [1, 2, 8, 9], [1, 8, 8, 8]
GOOD = Precision(hits=2, chosen=2, random=0.5, chance=0.01, percentile=0.9)


@pytest.mark.parametrize(
    ("before", "after", "images", "says"),
    [
        (0.95, 0.02, 10000, "is removed"),
        (0.95, 0.30, 10000, "weakened, not removed"),
        (0.95, 0.095, 1000, "weakened, perhaps removed"),
        (0.95, 0.90, 10000, "still works"),
        (0.5, 0.25, 100, "may still work"),
        (0.05, 0.02, 10000, "no working backdoor"),
    ],
)
def test_the_verdict_is_about_what_the_trigger_adds(before: float, after: float, images: int, says: str) -> None:
    found = attack_outcome(predictions((0.88, after), (0.9, before), images))
    head, sentence = headline(found, *({"test_acc": Interval(acc, acc, acc)} for acc in (0.9, 0.88)))
    assert says in head and "fell by 2.00 points" in sentence and f"(before: {100 * before:.2f} %)" in sentence
    assert "0.00 % of clean images of other classes" in sentence and ("too small" in sentence) != found["certain"]


@pytest.mark.parametrize(
    ("verdict", "says"),
    [
        ({"backdoored": True, "target": 3, "too_few": False}, "This model is judged backdoored, target class 3"),
        ({"backdoored": True, "target": "all-to-all", "too_few": False}, "This model is judged backdoored, all-to-all"),
        ({"backdoored": False, "target": 3, "too_few": False}, "This model is not shown to be backdoored"),
        (
            {"backdoored": False, "target": 3, "too_few": True},
            "No triggered image is known, so attack success was not measured",
        ),
        (None, "No triggered image is known, so attack success was not measured"),
    ],
)
def test_without_triggered_images_the_verdict_is_the_headline(verdict: dict[str, Any] | None, says: str) -> None:
    untested = {"outcome": NOT_TESTED, "certain": True}
    accuracy = {"test_acc": Interval(0.9, 0.9, 0.9)}
    head, _ = headline(untested, accuracy, accuracy, verdict)
    assert head == says


def test_sentences_tell_before_from_after() -> None:
    outcome = {"outcome": "weakened", "certain": True, "asr_before": 0.95, "asr_after": 0.3, "chance_before": 0.01}
    outcome |= {"chance": 0.04, "excess": 0.26, "excess_low": 0.2, "excess_high": 0.32}
    high, low = ({"test_acc": Interval(acc, acc, acc)} for acc in (0.9, 0.88))
    assert headline(outcome, high, low)[1] == (
        "The trigger now succeeds on 30.00 % of triggered test images (before: 95.00 %). Without any trigger, 4.00 % of clean "
        "images of other classes get the attacker's class, so the trigger itself adds 26.0 points (95 % interval 20.0 to "
        "32.0). Accuracy on clean images fell by 2.00 points, to 88.00 %."
    )
    assert headline(outcome, low, high)[1].endswith("rose by 2.00 points, to 90.00 %.")
    assert headline(outcome, low, low)[1].endswith("stayed at 88.00 %.")


def said(
    correct: list[int], rows: Any = None, precision: Precision | None = GOOD, samples: int = 32, pairs: int = 256, **more: Any
) -> str:
    run = made_run(scored_maps({"a": correct}, samples), rows, **{"settings": {"p": 2}, **more})
    return " ".join(" ".join(pair) for pair in warnings(run, own_pruning(run), precision, pairs))


def test_a_good_run_has_no_warning() -> None:
    assert said(APART) == ""


def test_each_warning_has_its_cause() -> None:
    assert "3 feature maps are tied" in said(TIED)
    assert "no better than random" in said(APART, precision=GOOD._replace(chance=0.3))
    assert "Accuracy fell by 4.0 points" in said(APART, predictions((0.86, 0.02)))
    few = said(APART, precision=GOOD._replace(chance=0.3), pairs=6)
    assert "measured on 6 pairs of images only" in few and "no better than random" not in few
    assert "The record holds few poisoned images" in few and "raise it" in said(APART, pairs=6, test_images=500)
    assert "on 8 images only" in said(APART, samples=8)
    assert "has 100 images only" in said(APART, clean_images=100)
    assert "test sets are small" in said(APART, predictions((0.9, 0.02), images=50))
    assert "Nothing was pruned" in said(APART, settings={"p": 8}) and "lower --p" in said(APART, settings={"p": 8})
    assert "An even sample of at most 500 images" in said(APART, test_images=500)
    sentence = "The attack reported other figures in record/x/attack_df_summary.csv: Acc 12.0 % here, 28.5 % there. Perhaps."
    assert sentence in said(APART, warnings=[sentence])


def test_a_budget_that_allows_nothing_is_named_and_one_that_allows_much() -> None:
    maps = scored_maps({"a": APART}).drop(columns=["correct", "samples", "margin", "rank"]).assign(moved=0.0)
    dear = made_run(maps, predictions((0.86, 0.02)), {"selection": "trigger", "epochs": 0})
    assert "a smaller --budget, or" in dict(warnings(dear, own_pruning(dear), None, 0))["Accuracy fell by 4.0 points."]
    run = made_run(maps, settings={"selection": "trigger", "budget": 0.02})
    assert "--budget 0.02" in dict(warnings(run, own_pruning(run), None, 0))["Nothing was pruned."]


def test_the_page_shows_the_attacks_own_figures_the_quick_look_and_names_as_text() -> None:
    bad, sentence = "<script>alert(1)</script>", "The attack reported other figures: Acc 12.0 % here, 28.5 % there."
    run = made_run(
        scored_maps({bad: APART}),
        settings={"p": 2, "log": bad},
        **{"model": bad, "device": bad, "record": bad, "warnings": [sentence, bad], "test_images": 500},
        attack_figures=dict(zip(METRICS, (0.285, 0.9, 0.05), strict=True)),
    )
    text = page(run, 10, None, f"No pairs here {bad}.", {})
    assert sentence in text and "Acc 28.50, ASR 90.00, RA 5.00" in text
    assert "tested on a sample of 500 images" in text and "No pairs here" in text
    assert bad not in text and "&lt;script&gt;alert(1)" in text


@pytest.mark.parametrize("preset", [{}, {"preset": "strong"}, {"preset": "strong", "masked": "False", "frg_samples": "32"}])
def test_the_command_repeats_the_run(preset: dict[str, str]) -> None:
    settings = load_settings({"result_file": "a b", "p": "32", "eps": "8/255", "steplr_milestones": "3,4", **preset})
    words = command(json.loads(json.dumps(vars(settings))))
    assert "--result_file 'a b'" in words and "--lr" not in words and "--selection" not in words
    assert ("--preset strong" in words) == bool(preset) and ("--masked False" in words) == ("masked" in preset)
    parser = Parser("fmp")
    add_arguments(parser)
    assert load_settings(vars(parser.parse_args(shlex.split(words)[2:]))) == settings


@pytest.mark.parametrize("content", ["ratio: 0.5", "{ratio: 0.5, preset: strong, lr: 0.3}"])
def test_the_command_repeats_the_run_where_a_settings_file_says_otherwise(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BackdoorBench's users edit theirs, and it is read by every command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config/defense/fmp").mkdir(parents=True)
    (tmp_path / "config/defense/fmp/config.yaml").write_text(content)
    parser = Parser("fmp")
    add_arguments(parser)
    for flags in ({"ratio": "0.1"}, {"preset": "paper", "ratio": "0.1"}, {"preset": "strong", "lr": "0.01"}, {"p": "8"}):
        settings = load_settings({"result_file": "x", **flags})
        words = command(json.loads(json.dumps(vars(settings))))
        assert load_settings(vars(parser.parse_args(shlex.split(words)[2:]))) == settings


def test_the_command_of_an_ablation_leaves_out_what_its_rows_set() -> None:
    settings = Settings(result_file="x", selection="none", scope="global", masked=True, p=8, defense_name="ablate-oracle")
    words = command(vars(settings), "ablate.py --rows oracle")
    assert words == "python record_scripts/ablate.py --rows oracle --result_file x --p 8"


@pytest.mark.parametrize("targets", [1, 2])
def test_what_a_backdoor_looks_like_by_class(targets: int) -> None:
    rows = predictions((0.9, 0.02))
    rows.loc[rows["poisoned"] & (rows.index % 2 == 0), ["label", "target"]] = (2, 0 if targets == 1 else 3)
    text = page(made_run(scored_maps({"a": APART}), rows), 10, None, "No pairs.", {})
    assert ("a full column at the attacker" in text) == (targets == 1)
    assert ("all-to-all, the one beside the diagonal" in text) == (targets == 2)
