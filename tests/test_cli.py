"""Other ways to run the command and the class."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import fmp
import pandas as pd
import pytest
import torch
from command import FT_COLUMNS, MAPS, QUICK, RESULTS, Edit, Run, listing, table, weights
from conftest import MODEL, RECORD, Ran, call_fmp
from fmp_core.errors import UserError
from fmp_core.inputs import DefenderInputs
from fmp_core.inversion import trigger as triggers
from fmp_core.inversion import verdict as verdicts
from fmp_core.inversion.trigger import FAMILIES
from fmp_core.selection.choice import Selection
from fmp_core.settings import PROJECT, Settings
from fmp_core.system.cli import Stages
from narrow_resnet import NARROW_RESNET_MAPS


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
    assert "5 clean and 5 poisoned (--test_images 5" in ran.err and "even sample of at most 5 images" in ran.out
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


def test_records_of_one_name_keep_apart_in_another_folder(workplace: Path, run_fmp: Run):
    (workplace / "record" / "deep").mkdir()
    shutil.copytree(workplace / "record" / RECORD, workplace / "record" / "deep" / RECORD)
    for name in (RECORD, f"deep/{RECORD}"):
        assert run_fmp(*QUICK, "--epochs", "0", "--save_folder", "elsewhere", "--result_file", name).code == 0
        assert (workplace / "elsewhere" / name / "defense" / "fmp" / "metrics.json").is_file()


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
    assert {value.dtype for value in result.values()} == {torch.float32}  # of a record in float16: not rounded
    assert not any(key.startswith("module.") for key in result)
    own = outcome["model"].state_dict()
    assert all(torch.equal(own[key], value) for key, value in result.items())
    assert sorted(path.name for path in (tmp_path / "logs").iterdir())[-1] == "index.txt"
    assert sorted(os.listdir(tmp_path)) == ["index.txt", "logs", "moved"]


def test_an_interrupt_before_anything_is_read_is_one_sentence(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fmp_core.system.distributed.choose_device", interrupted)
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
    for line in ("--result_file another", f"--result_file {RECORD}", f"python {PROJECT / 'record_scripts' / 'make_record.py'}"):
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
