"""report.html of a real (tiny) run: what it states, what it never does, and what it says when something is missing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fmp
import pandas as pd
import pytest
import report as report_script
import torch
from conftest import RECORD, Ran, call_fmp
from fmp_core.data.attack_record import read_attack_record
from fmp_core.inversion.trigger import INVERTED_TRIGGER, InvertedTrigger, save_trigger
from fmp_core.models.activation_change import Precision
from fmp_core.report.data import Run
from fmp_core.report.figures import training_curves
from fmp_core.report.findings import command, verdict, warnings
from fmp_core.report.intervals import Interval, wilson

QUICK = ("--result_file", RECORD, "--frg_samples", "2", "--p", "16", "--device", "cpu")
RESULTS = Path("record") / RECORD / "defense" / "fmp"


@pytest.fixture(scope="module")
def finished(workplace_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A workplace after one run with a report."""
    root = tmp_path_factory.mktemp("reported") / "workplace"
    shutil.copytree(workplace_template, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        ran = call_fmp(*QUICK, "--epochs", "2")
    assert ran.code == 0, ran.err
    yield root


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to write into, as the current folder."""
    root = tmp_path / "place"
    shutil.copytree(finished, root)
    monkeypatch.chdir(root)
    return root


def make(*flags: str) -> int:
    return report_script.main(["--result_file", RECORD, "--device", "cpu", *flags])


def page(root: Path) -> str:
    return (root / RESULTS / "report.html").read_text(encoding="utf-8")


def strips(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="maps">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_page_is_self_contained_and_small(finished: Path):
    text = page(finished)
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<(link|iframe|object)\b(?![^>]*href=\"data:)|<script[^>]*\bsrc=|@import|url\((?!#)", text)
    assert len(text.encode()) < 5_000_000
    assert text.count("<svg") == 7 and "prefers-color-scheme: dark" in text


def test_the_figures_are_those_of_the_run(finished: Path):
    text, metrics = page(finished), json.loads((finished / RESULTS / "metrics.json").read_text())
    for when in ("before", "after"):
        for value in metrics[when].values():
            assert f"{100 * value:.2f}" in text
    assert f"{100 * metrics['der']:.2f}" in text
    low = wilson(metrics["after"]["test_acc"], 10).low
    assert f"{100 * low:.2f}" in text
    assert "--p 16" in text and metrics["versions"]["torch"] in text and "ranking" in text


def test_predictions_agree_with_the_metrics(finished: Path):
    frame = pd.read_csv(finished / RESULTS / "predictions.csv")
    metrics = json.loads((finished / RESULTS / "metrics.json").read_text())
    clean, triggered = frame[~frame["poisoned"]], frame[frame["poisoned"]]
    assert (len(clean), len(triggered)) == (10, 9)
    for when in ("before", "after"):
        assert (clean[when] == clean["label"]).mean() == metrics[when]["test_acc"]
        assert (triggered[when] == triggered["target"]).mean() == metrics[when]["test_asr"]
        assert (triggered[when] == triggered["label"]).mean() == metrics[when]["test_ra"]


def test_every_map_is_in_its_strip(finished: Path):
    maps = pd.read_csv(finished / RESULTS / "feature_maps.csv")
    drawn = strips(page(finished))
    assert [layer["name"] for layer in drawn["layers"]] == list(maps["layer"].drop_duplicates())
    for layer in drawn["layers"]:
        group = maps[maps["layer"] == layer["name"]].sort_values("rank")
        assert layer["channel"] == group["channel"].tolist() and layer["correct"] == group["correct"].tolist()
        assert layer["pruned"] == group["pruned"].astype(int).tolist()
        assert layer["cuts"][drawn["ps"].index(16)] == sum(layer["pruned"]) == len(group) // 16
        assert sorted(layer["tacRank"]) == list(range(1, len(group) + 1))
        assert all(a >= b for a, b in zip(*(iter(x) for x in (sorted(layer["tac"])[1:], sorted(layer["tac"]))), strict=False))


def test_made_later_it_is_the_same_page_but_for_the_date(place: Path):
    before = page(place)
    (place / RESULTS / "predictions.csv").unlink()  # as runs of earlier versions
    (place / RESULTS / "report.html").unlink()
    assert make() == 0
    undated = [re.sub(r"Written [^.]*\.", "", text) for text in (before, page(place))]
    assert undated[0] == undated[1]
    assert (place / RESULTS / "predictions.csv").is_file()


def test_a_report_changes_no_weight(finished: Path, place: Path):
    (place / RESULTS / "report.html").unlink()
    assert call_fmp(*QUICK, "--epochs", "2", "--report", "False").code == 0
    assert not (place / RESULTS / "report.html").exists()
    ours, theirs = (torch.load(root / RESULTS / "defense_result.pt", weights_only=True) for root in (place, finished))
    assert all(torch.equal(value, theirs["model"][key]) for key, value in ours["model"].items())


def test_names_from_a_record_are_text_and_never_markup(place: Path):
    bad = "<script>alert(1)</script>"
    metrics = json.loads((place / RESULTS / "metrics.json").read_text())
    metrics["model"] = metrics["device"] = metrics["settings"]["log"] = bad
    (place / RESULTS / "metrics.json").write_text(json.dumps(metrics))
    assert make() == 0
    assert bad not in page(place) and "&lt;script&gt;alert(1)" in page(place)


def test_other_defenses_stand_in_a_table(place: Path):
    header = ",test_acc,test_asr,test_ra\n"
    for name, rows in (("ft", "last,0.8,0.25,0.5\nvalid_max,0.9,0.9,0.9\n"), ("clp", "0,0.75,0.125,0.625\n")):
        (place / RESULTS.parent / name).mkdir()
        (place / RESULTS.parent / name / f"{name}_df_summary.csv").write_text(header + rows)
    assert make("--compare", "ft", "clp") == 0
    text = page(place)
    assert "Beside other defenses" in text
    for row in (r"ft</th>\s*<td>80.00<.*?<td>25.00<.*?<td>50.00<", r"clp</th>\s*<td>75.00<.*?<td>12.50<.*?<td>62.50<"):
        assert re.search(row, text, re.DOTALL)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--compare", "anp"], "--compare anp: .*does not exist"),
        (["--defense_name", "other"], "other does not exist"),
        (["--dataset_path", "nowhere"], "nowhere"),
    ],
)
def test_what_is_missing_is_named(place: Path, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    before = page(place)
    assert make(*flags) == 2
    error = capsys.readouterr().err
    assert re.search(says, error) and error.count("\n") == 1
    assert page(place) == before


def test_a_result_folder_that_is_a_link_out_of_the_record_is_refused(place: Path, capsys: pytest.CaptureFixture[str]):
    elsewhere = place / "elsewhere"
    shutil.move(place / RESULTS, elsewhere)
    (place / RESULTS).symlink_to(elsewhere)
    before = (elsewhere / "report.html").stat().st_mtime_ns
    assert make() == 2
    assert "leads out of the record" in capsys.readouterr().err
    assert (elsewhere / "report.html").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["metrics.json", "feature_maps.csv", "fmp_df.csv"])
@pytest.mark.parametrize("content", [None, "", "{}", "a,b\n1,2\n"])
def test_a_damaged_result_is_one_line(place: Path, name: str, content: str | None, capsys: pytest.CaptureFixture[str]):
    file = place / RESULTS / name
    file.unlink()
    if content is not None:
        file.write_text(content)
    assert make() == 2
    error = capsys.readouterr().err
    assert "fmp" in error and error.count("\n") == 1


def test_without_twins_the_page_says_so(place: Path, edit_record: Callable[[Path, Callable[[dict[str, Any]], Any]], None]):
    def as_v1(content: dict[str, Any]) -> None:
        state = content["bd_test"]
        items = [state["bd_data_container"]["data_dict"][i]["other_info"] for i in range(1, 10)]
        images = torch.zeros(9, 3, 32, 32)
        content["bd_test"] = {"x": images, "y": [i[0] for i in items], "original_targets": [i[1] for i in items]}

    edit_record(place / "record" / RECORD, as_v1)
    assert make() == 0
    text = page(place)
    assert "does not say which clean test image" in text and "TAC rank" not in text
    assert "tac" not in strips(text)["layers"][0]


def test_twins_of_other_labels_are_no_twins(place: Path, edit_record: Callable[[Path, Callable[[dict[str, Any]], Any]], None]):
    def relabel(content: dict[str, Any]) -> None:
        for item in content["bd_test"]["bd_data_container"]["data_dict"].values():
            item["other_info"][1] = 5

    edit_record(place / "record" / RECORD, relabel)
    assert make() == 0
    assert "another order" in page(place)


@pytest.mark.parametrize("selection", ["random", "none"])
def test_ablations_have_a_page_without_strips(selection: str, run_fmp: Callable[..., Ran], workplace: Path):
    flags = ["--selection", selection, "--epochs", "0", "--report", "True"]
    assert run_fmp(*QUICK, *flags).code == 0
    text = page(workplace)
    assert f"--selection {selection}" in text and 'id="maps"' not in text and "<script" not in text
    assert ("Pruned maps, one per layer" in text) == (selection == "random")
    assert "No epoch of fine-tuning was run" in text


def test_all_maps_together_have_cuts_of_their_own(place: Path):
    assert call_fmp(*QUICK, "--scope", "global", "--epochs", "0").code == 0
    drawn = strips(page(place))
    maps = pd.read_csv(place / RESULTS / "feature_maps.csv")
    for number, p in enumerate(drawn["ps"]):
        assert sum(layer["cuts"][number] for layer in drawn["layers"]) == len(maps) // p


# Maps chosen by a inverted trigger (--preset strong).

VERDICT = {"backdoored": True, "target": 3, "family": "sparse", "success": [0.1, 0.2, 0.0, 0.9], "lead": 0.7}


def by_trigger(folder: Path) -> pd.DataFrame:
    """The run in ``folder`` as one whose maps were chosen by a inverted trigger, among them the last of each layer."""
    maps = pd.read_csv(folder / "feature_maps.csv")
    maps = maps.drop(columns=["correct", "samples", "margin", "rank"]).assign(moved=1 / (1 + maps["channel"]))
    maps["pruned"] = maps["channel"] < 2
    maps.to_csv(folder / "feature_maps.csv", index=False)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["verdict"] = VERDICT
    metrics["settings"] |= {"preset": "strong", "selection": "shift"}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    side = read_attack_record(folder.parent.parent).image_size
    save_trigger(
        folder / INVERTED_TRIGGER, InvertedTrigger("sparse", 3, torch.ones(1, 3, *side[:2]), torch.ones(1, 1, *side[:2]).bool())
    )
    return maps


def test_maps_chosen_by_a_trigger_have_no_cut_and_no_ties(place: Path):
    maps = by_trigger(place / RESULTS)
    assert make() == 0
    text = page(place)
    drawn = strips(text)
    assert drawn["ps"] == [] and all(layer["tied"] == 0 and layer["cuts"] == [] for layer in drawn["layers"])
    assert drawn["layers"][0]["channel"] == sorted(drawn["layers"][0]["channel"])
    assert drawn["layers"][0]["moved"] == pytest.approx([1 / (1 + c) for c in drawn["layers"][0]["channel"]], rel=1e-3)
    assert sum(sum(layer["pruned"]) for layer in drawn["layers"]) == int(maps["pruned"].sum())
    assert "What another p would prune" not in text and "blue line" not in text and 'id="ps"' not in text
    assert "backdoored, towards class 3 (a inverted trigger, sparse, turns 90 % of" in text and "70 points behind" in text
    assert "is what the inverted trigger" in text


def test_a_budget_that_allows_nothing_is_named():
    run = a_run([1, 2, 8, 9], [False] * 4)
    run.metrics["settings"] |= {"selection": "trigger", "budget": 0.02}
    run.maps["moved"] = 0.0
    found = dict(warnings(run, metrics_of(0.9, 0.9), metrics_of(0.9, 0.1), None))
    assert "--budget 0.02" in found["Nothing was pruned."]


def test_curves_without_a_finite_loss_are_drawn():
    history = pd.DataFrame({"epoch": [0, 1], "loss": [float("nan"), float("nan")]})
    assert "<svg" in training_curves(history, {"loss": ("train", "#010101")}, "Loss", False)


# The words.


def metrics_of(acc: float, asr: float, total: int = 10000) -> dict[str, Interval]:
    return {"test_acc": wilson(acc, total), "test_asr": wilson(asr, total), "test_ra": wilson(0.5, total)}


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        (0.95, 0.02, "is removed"),
        (0.95, 0.30, "weakened"),
        (0.95, 0.90, "still works"),
        (0.05, 0.02, "no working backdoor"),
    ],
)
def test_the_verdict_follows_the_asr(before: float, after: float, says: str):
    head, sentence = verdict(metrics_of(0.9, before), metrics_of(0.88, after))
    assert says in head and "fell by 2.00 points" in sentence


def a_run(correct: list[int], pruned: list[bool], samples: int = 32, clean: int = 5000, images: int = 10000) -> Run:
    n = len(correct)
    maps = pd.DataFrame({"layer": "a", "channel": range(n), "correct": correct, "samples": samples})
    maps = maps.assign(margin=0.0, rank=maps["correct"].rank(method="first").astype(int), pruned=pruned)
    rows = pd.DataFrame({"poisoned": [False] * images + [True] * images, "label": 0, "target": 0, "before": 0, "after": 0})
    settings = {"p": 2, "scope": "layer", "selection": "frg"}
    return Run(Path("x"), {"settings": settings, "clean_images": clean}, maps, pd.DataFrame(), rows)


GOOD = Precision(hits=2, chosen=2, random=0.5, chance=0.01, percentile=0.9)


def said(run: Run, acc_after: float = 0.9, precision: Precision | None = GOOD) -> str:
    return " ".join(what for what, _ in warnings(run, metrics_of(0.9, 0.9), metrics_of(acc_after, 0.1), precision))


def test_a_good_run_has_no_warning():
    assert said(a_run([1, 2, 8, 9], [True, True, False, False])) == ""


def test_each_warning_has_its_cause():
    flags = [True, True, False, False]
    assert "3 feature maps are tied" in said(a_run([1, 8, 8, 8], flags))
    assert "no better than random" in said(a_run([1, 2, 8, 9], flags), precision=GOOD._replace(chance=0.3))
    assert "Accuracy fell by 4.0 points" in said(a_run([1, 2, 8, 9], flags), acc_after=0.86)
    assert "on 8 images only" in said(a_run([1, 2, 8, 9], flags, samples=8))
    assert "has 100 images only" in said(a_run([1, 2, 8, 9], flags, clean=100))
    assert "test sets are small" in said(a_run([1, 2, 8, 9], flags, images=50))
    assert "Nothing was pruned" in said(a_run([1, 2, 8, 9], [False] * 4))


@pytest.mark.parametrize("preset", [{}, {"preset": "strong"}, {"preset": "strong", "masked": "False", "frg_samples": "32"}])
def test_the_command_repeats_the_run(preset: dict[str, str]):
    settings = fmp.load_settings({"result_file": "a b", "p": "32", "eps": "8/255", "steplr_milestones": "3,4", **preset})
    words = command(json.loads(json.dumps(vars(settings))))
    assert "--result_file 'a b'" in words and "--lr" not in words and "--selection" not in words
    assert ("--preset strong" in words) == bool(preset) and ("--masked False" in words) == ("masked" in preset)
    import shlex

    parser = fmp.argparse.ArgumentParser()
    fmp.FMP.add_arguments(parser)
    assert fmp.load_settings(vars(parser.parse_args(shlex.split(words)[2:]))) == settings
