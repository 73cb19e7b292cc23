"""report.html of one real (tiny) run: what it states, what it never does, and what it says when something is missing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import report as report_script
import torch
from command import Edit
from conftest import RECORD, call_fmp
from fmp_core.data.attack_record import read_attack_record
from fmp_core.errors import UserError
from fmp_core.inversion.trigger import INVERTED_TRIGGER, InvertedTrigger, save_trigger
from fmp_core.metrics import METRICS
from fmp_core.report.data import load_attacked, read_summary
from fmp_core.report.figures import training_curves
from fmp_core.results.intervals import wilson
from fmp_core.results.removal import OUTCOMES, attack_outcome
from fmp_core.storage.files import file_digest
from made_runs import VERDICT

SAMPLE = ("--test_images", "8")  # of 10 clean and 9 triggered images
RESULTS = Path("record") / RECORD / "defense" / "fmp"


@pytest.fixture(scope="module")
def finished(workplace_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A workplace after one run with a report."""
    root = tmp_path_factory.mktemp("reported") / "workplace"
    shutil.copytree(workplace_template, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        ran = call_fmp("--result_file", RECORD, "--frg_samples", "2", "--p", "16", "--device", "cpu", "--epochs", "2", *SAMPLE)
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
        for name in METRICS:
            assert f"{100 * metrics[when][name]:.2f}" in text
    assert f"{100 * metrics['der']:.2f}" in text
    assert f"{100 * wilson(metrics['after']['test_acc'], 8).low:.2f}" in text
    assert "--p 16" in text and "--test_images 8" in text and "tested on a sample of 8 images" in text
    assert metrics["versions"]["torch"] in text and "ranking" in text
    outcome = attack_outcome(pd.read_csv(finished / RESULTS / "predictions.csv"))
    assert metrics["removal"] == outcome and OUTCOMES[outcome["outcome"], outcome["certain"]] in text


def test_every_map_is_in_its_strip(finished: Path):
    maps = pd.read_csv(finished / RESULTS / "feature_maps.csv")
    drawn = strips(page(finished))
    assert [layer["name"] for layer in drawn["layers"]] == list(maps["layer"].drop_duplicates())
    assert drawn["choices"][drawn["own"]] == 16
    for layer in drawn["layers"]:
        group = maps[maps["layer"] == layer["name"]].sort_values("rank")
        assert layer["channel"] == group["channel"].tolist() and layer["correct"] == group["correct"].tolist()
        pruned = layer["cuts"][drawn["own"]][0]
        assert group["pruned"].tolist() == [position < pruned for position in range(len(group))] and pruned == len(group) // 16
        by_tac = [layer["tac"][layer["tacRank"].index(rank)] for rank in range(1, len(group) + 1)]
        assert by_tac == sorted(by_tac, reverse=True)


def test_made_later_it_is_the_same_page_but_for_the_date_and_changes_nothing_else(place: Path, finished: Path):
    assert make() == 0
    undated = [re.sub(r"Written [^.]*\.", "", page(root)) for root in (finished, place)]
    assert undated[0] == undated[1]
    for file in (finished / RESULTS).rglob("*"):
        if file.is_file() and file.name != "report.html":
            assert (place / file.relative_to(finished)).read_bytes() == file.read_bytes()


def test_other_defenses_stand_in_a_table(place: Path):
    header = ",test_acc,test_asr,test_ra\n"
    for name, rows in (("ft", "last,0.8,0.25,0.5\nvalid_max,0.9,0.9,0.9\n"), ("clp", "0,0.75,0.125,0.625\n")):
        (place / RESULTS.parent / name).mkdir()
        (place / RESULTS.parent / name / f"{name}_df_summary.csv").write_text(header + rows)
    edit_metrics(place, {}, test_images=None)  # a run on all images
    assert make("--compare", "ft", "clp") == 0
    text = page(place)
    assert "Beside other defenses" in text
    for row in (r"ft</th>\s*<td>80.00<.*?<td>25.00<.*?<td>50.00<", r"clp</th>\s*<td>75.00<.*?<td>12.50<.*?<td>62.50<"):
        assert re.search(row, text, re.DOTALL)


def test_results_of_another_record_or_on_a_sample_are_not_compared(place: Path, capsys: pytest.CaptureFixture[str]):
    metrics = json.loads((place / RESULTS / "metrics.json").read_text())
    for name, changes, says in (
        ("old", {"attack_result": "0" * 64}, "is of another attack_result.pt"),
        ("quick", {"test_images": 20}, "was tested on 20 images only"),
    ):
        (place / RESULTS.parent / name).mkdir()
        (place / RESULTS.parent / name / "metrics.json").write_text(json.dumps({**metrics, **changes}))
        assert make("--compare", name) == 2
        assert says in capsys.readouterr().err
    whole = {"test_images": None, "settings": {**metrics["settings"], "test_images": None}}
    (place / RESULTS.parent / "old" / "metrics.json").write_text(json.dumps({**metrics, **whole}))
    assert make("--compare", "old") == 2 and "8 images only; run it without --test_images" in capsys.readouterr().err


def test_what_is_missing_damaged_or_outside_is_one_sentence(place: Path, capsys: pytest.CaptureFixture[str]):
    def fails(says: str, *flags: str) -> None:
        assert make(*flags) == 2
        error = capsys.readouterr().err
        assert re.search(says, error) and error.count("\n") == 1, error

    before = page(place)
    fails("--compare anp: .*does not exist", "--compare", "anp")
    fails("other does not exist", "--defense_name", "other")
    fails("nowhere", "--dataset_path", "nowhere")
    for name in ("metrics.json", "feature_maps.csv", "fmp_df.csv", "predictions.csv"):
        file = place / RESULTS / name
        content = file.read_bytes()
        for damaged in (None, "", "{}", "a,b\n1,2\n"):
            file.unlink() if damaged is None else file.write_text(damaged)
            fails(name)
        file.write_bytes(content)
    rows = pd.read_csv(place / RESULTS / "predictions.csv")
    rows.assign(after=rows["label"]).to_csv(place / RESULTS / "predictions.csv", index=False)
    fails("of different runs")
    assert page(place) == before
    elsewhere = place / "elsewhere"
    shutil.move(place / RESULTS, elsewhere)
    (place / RESULTS).symlink_to(elsewhere)
    fails("leads out of the record")


@pytest.mark.parametrize("value", [None, "x", [], -5, {}])
def test_a_hand_damaged_metrics_json_is_one_sentence(value: Any, finished: Path, tmp_path: Path):
    metrics = json.loads((finished / RESULTS / "metrics.json").read_text())
    metrics["verdict"] = VERDICT
    path, refused = tmp_path / "metrics.json", []

    def place(name: str, content: Any) -> None:
        path.write_text(json.dumps(content))
        try:
            read_summary(tmp_path)
        except UserError as error:
            assert error.args[0].count("\n") == 0
            refused.append(name)

    place("nothing", metrics)
    assert not refused
    for name in metrics:
        place(name, {**metrics, name: value})
    for part in ("verdict", "settings", "after", "seconds"):
        for name in metrics[part]:
            place(f"{part}.{name}", {**metrics, part: {**metrics[part], name: value}})
    assert {"before", "after", "verdict.target", "verdict.success"} <= set(refused)


def test_without_pairs_the_page_says_so(place: Path, edit_record: Callable[[Path, Callable[[dict[str, Any]], Any]], None]):
    def as_v1(content: dict[str, Any]) -> None:
        rows = content["bd_test"]["bd_data_container"]["data_dict"]
        items = [rows[i]["other_info"] for i in range(1, 10)]
        images = torch.zeros(9, 3, 32, 32)
        content["bd_test"] = {"x": images, "y": [i[0] for i in items], "original_targets": [i[1] for i in items]}

    edit_record(place / "record" / RECORD, as_v1)
    edit_metrics(place, {}, attack_result=file_digest(place / "record" / RECORD / "attack_result.pt"))
    assert make() == 0
    text = page(place)
    assert "does not say which clean test image" in text and "TAC rank" not in text
    assert "tac" not in strips(text)["layers"][0]


def test_a_record_that_was_made_again_is_not_the_runs(place: Path, edit_record: Callable[..., None], capsys):
    edit_record(
        place / "record" / RECORD, lambda content: content["model"].update({"fc.bias": content["model"]["fc.bias"] + 1})
    )
    assert make() == 2
    assert "attack_result.pt is not the model that the run in" in capsys.readouterr().err


def test_an_ablation_that_prunes_other_maps_than_it_measures_has_no_strips(place: Path):
    maps = pd.read_csv(place / RESULTS / "feature_maps.csv").drop(columns=["correct", "samples", "margin", "rank"])
    maps.assign(moved=range(len(maps))).to_csv(place / RESULTS / "feature_maps.csv", index=False)
    edit_metrics(place, {"selection": "trigger"}, chosen_by="ablate.py --rows strong-random")
    assert make() == 0
    text = page(place)
    assert "This is an ablation (ablate.py" in text and 'id="maps"' not in text
    assert "Nothing was pruned" not in text


def test_a_random_selection_has_a_page_without_strips(place: Path):
    maps = pd.read_csv(place / RESULTS / "feature_maps.csv")
    maps.drop(columns=["correct", "samples", "margin", "rank"]).to_csv(place / RESULTS / "feature_maps.csv", index=False)
    history = pd.read_csv(place / RESULTS / "fmp_df.csv", index_col=0)
    history.assign(train_acc=None).to_csv(place / RESULTS / "fmp_df.csv")  # as of --epochs 0
    edit_metrics(place, settings={"selection": "random"})
    assert make() == 0
    text = page(place)
    assert "--selection random" in text and 'id="maps"' not in text and "<script" not in text
    assert "Pruned maps, one per layer" in text and "No epoch of fine-tuning was run" in text


def test_maps_selected_by_an_inverted_trigger_have_no_cut(place: Path):
    maps = pd.read_csv(place / RESULTS / "feature_maps.csv")
    maps = maps.drop(columns=["correct", "samples", "margin", "rank"]).assign(moved=1 / (1 + maps["channel"]))
    maps["pruned"] = maps["channel"] < 2
    maps.to_csv(place / RESULTS / "feature_maps.csv", index=False)
    edit_metrics(place, settings={"preset": "strong", "selection": "trigger"}, verdict=VERDICT)
    height, width, channels = read_attack_record(place / "record" / RECORD).image_size
    values, where = torch.ones(1, channels, height, width), torch.ones(1, 1, height, width).bool()
    save_trigger(place / RESULTS / INVERTED_TRIGGER, InvertedTrigger("sparse", 3, values, where))
    assert make() == 0
    text = page(place)
    drawn = strips(text)
    assert drawn["layers"][0]["change"][:2] == [1, 0.5] and drawn["layers"][0]["cuts"][0][0] == 2
    assert "What another p would prune" not in text and "blue line" not in text and 'id="ps"' not in text
    assert "backdoored, target class 3" in text and "90 % of images of other classes" in text
    assert "70.0 points more than for the runner-up" in text and "is what the inverted trigger" in text
    edit_metrics(place, settings={}, verdict={**VERDICT, "target": "all-to-all", "success_all_to_all": 0.95})
    assert make() == 0
    assert "backdoored, all-to-all. An inverted trigger (sparse) flips the predictions of 95 % of images" in page(place)


def test_a_verdict_that_finds_nothing_says_how_close_it_was(place: Path):
    edit_metrics(place, settings={}, verdict={**VERDICT, "backdoored": False, "success": [0.1, 0.2, 0.0, 0.4], "lead": 0.2})
    assert make() == 0
    text = " ".join(page(place).split())
    assert "not shown to be backdoored, which does not mean clean" in text
    assert "flips 40 % of images of other classes to class 3, 20.0 points more than the runner-up; 30 are needed" in text


def test_images_held_in_the_record_are_read_with_the_normalisation_of_the_run(
    place: Path, edit_record: Edit, capsys: pytest.CaptureFixture[str]
):
    home = place / "record" / RECORD
    poisoned = read_attack_record(home).bd_test
    x = (poisoned.pixels(read_attack_record(home).image_size).float() / 255 - 0.5) / 0.25
    held = {"x": x, "y": poisoned.targets, "original_index": poisoned.indices, "original_targets": poisoned.original}
    edit_record(home, lambda content: content.update(bd_test=held))
    edit_metrics(place, settings={}, attack_result=file_digest(home / "attack_result.pt"))
    assert make() == 2 and "--mean and --std name others" in capsys.readouterr().err
    edit_metrics(place, settings={"mean": [0.5], "std": [0.25]})
    assert make() == 0


def edit_metrics(root: Path, settings: dict[str, Any], **more: Any) -> None:
    file = root / RESULTS / "metrics.json"
    metrics = json.loads(file.read_text())
    file.write_text(json.dumps({**metrics, **more, "settings": {**metrics["settings"], **settings}}))


def test_curves_without_a_finite_loss_are_drawn():
    history = pd.DataFrame({"epoch": [0, 1], "loss": [float("nan"), float("nan")]})
    assert "<svg" in training_curves(history, {"loss": ("train", "#010101")}, "Loss", False)


def test_the_model_is_looked_at_with_the_normalisation_of_the_run(place: Path):
    images, given = torch.rand(2, 3, 32, 32), {"mean": [0.5], "std": [0.25]}
    model, _ = load_attacked(read_attack_record(place / "record" / RECORD), given, torch.device("cpu"))
    with torch.no_grad():
        assert model(images).equal(model.network((images - 0.5) / 0.25))
