"""The invariants of DESIGN.md, section 4, on the whole command."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

import fmp
import numpy as np
import pandas as pd
import pytest
import torch
from colours import CLASSES, FLAGS, NAME, SIZE, metrics, run_colours, saved_weights
from fmp_core.command import main
from fmp_core.inversion import trigger, verdict
from fmp_core.models.evaluate import TestData as Data
from fmp_core.models.evaluate import evaluate
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow_resnet import NARROW_RESNET_MAPS
from PIL import Image
from toy import Plain
from toy_cases import footprint, same, toy_case


def test_replaced_poisoned_images_change_no_weight(colours_run: Path, colours: Path) -> None:
    files = sorted((colours / "record" / NAME / "bd_test_dataset").rglob("*.png"))
    assert len(files) == 12
    generator = np.random.default_rng(0)
    for file in files:
        Image.fromarray(generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(file)
    other = run_colours(colours)
    assert same(saved_weights(colours_run), saved_weights(other))
    assert (colours_run / "feature_maps.csv").read_bytes() == (other / "feature_maps.csv").read_bytes()
    losses = [pd.read_csv(folder / "fmp_df.csv")["bd_test_loss_avg_over_batch"][0] for folder in (colours_run, other)]
    assert losses[0] != losses[1]  # they really were other images


def test_shuffled_poisoned_images_of_other_targets_change_no_weight(colours_run: Path, colours: Path) -> None:
    path = colours / "record" / NAME / "attack_result.pt"
    content = torch.load(path, weights_only=False)  # our own file
    bd_test = content["bd_test"]
    bd_test["original_index_array"] = bd_test["original_index_array"][::-1].copy()
    for item in bd_test["bd_data_container"]["data_dict"].values():
        label = item["other_info"][1]
        item["other_info"] = [label % 3 + 1, label]  # another target; the true labels are checked
    torch.save(content, path)
    other = run_colours(colours)
    assert same(saved_weights(colours_run), saved_weights(other))
    assert metrics(colours_run)["after"]["test_acc"] == metrics(other)["after"]["test_acc"]
    assert metrics(colours_run)["before"] != metrics(other)["before"]  # they really had other targets


@pytest.mark.slow
@settings(max_examples=int(os.environ.get("FMP_EXAMPLES", "20")), deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), chunk=st.sampled_from([8, 32, 64]), other=st.integers(0, 2**32 - 1))
def test_any_poisoned_test_set_gives_the_same_weights(colours_template: Path, seed: int, chunk: int, other: int) -> None:
    """Hypothesis draws the seed; the second run has another poisoned test set, another chunk, and tests less often."""
    flags = ["--random_seed", str(seed), "--frg_samples", "1", "--epochs", "2", "--p", "8"]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(colours_template, Path(folder) / "one")
        shutil.copytree(colours_template, Path(folder) / "two")
        draw = np.random.default_rng(other)
        path = Path(folder) / "two" / "record" / NAME / "attack_result.pt"
        content = torch.load(path, weights_only=False)  # our own file
        bd_test = content["bd_test"]
        victims = bd_test["original_index_array"]
        bd_test["original_index_array"] = draw.permutation(victims)[: draw.integers(1, len(victims) + 1)]
        for item in bd_test["bd_data_container"]["data_dict"].values():
            item["other_info"][0] = int(draw.integers(0, CLASSES))
        torch.save(content, path)
        for file in (path.parent / "bd_test_dataset").rglob("*.png"):
            Image.fromarray(draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(file)
        one = run_colours(Path(folder) / "one", *flags)
        two = run_colours(Path(folder) / "two", *flags, "--chunk", str(chunk), "--frequency_test", "0")
        assert same(saved_weights(one), saved_weights(two))
        assert (one / "feature_maps.csv").read_bytes() == (two / "feature_maps.csv").read_bytes()
        assert metrics(one)["before"]["test_acc"] == metrics(two)["before"]["test_acc"]


def test_strong_reads_no_poisoned_image_and_goes_on_where_it_stopped(colours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in one go; then with other poisoned images, stopped after the first epoch and started again: the same bits."""
    monkeypatch.setattr(verdict, "LEAST_MARGIN", -1.0)  # whatever the model, a trigger is reversed and unlearnt
    monkeypatch.setattr(verdict, "LEAST_HELD_OUT", 0)
    for name, fewer in (("STEPS", 4), ("SPARSE_BATCH", 16), ("DENSE_BATCH", 16)):
        monkeypatch.setattr(trigger, name, fewer)
    flags = ["--preset", "strong", "--dtype", "fp32", "--epochs", "2", "--frequency_test", "0"]
    results = run_colours(colours, *flags)
    kept = {name: (results / name).read_bytes() for name in ("feature_maps.csv", "reversed_trigger.pt")}
    weights_kept = saved_weights(results)
    shutil.rmtree(colours / "record" / NAME / "defense")
    for file in (colours / "record" / NAME / "bd_test_dataset").rglob("*.png"):
        Image.new("RGB", (SIZE, SIZE)).save(file)
    whole_test = fmp.FMP.evaluate

    def stopped(self: fmp.FMP, when: str) -> object:
        if when.startswith("epoch"):
            raise KeyboardInterrupt
        return whole_test(self, when)

    monkeypatch.setattr(fmp.FMP, "evaluate", stopped)
    places = ["--record_root", str(colours / "record"), "--dataset_path", str(colours / "data")]
    assert main(["--result_file", NAME, "--device", "cpu", *places, *FLAGS, *flags]) == 130
    assert not (results / "defense_result.pt").exists()
    monkeypatch.setattr(fmp.FMP, "evaluate", whole_test)
    results = run_colours(colours, *flags)
    assert same(weights_kept, saved_weights(results))
    assert kept == {name: (results / name).read_bytes() for name in kept}


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(12)), batch=st.integers(1, 13))
def test_order_and_batches_of_the_test_sets_change_no_rate(order: list[int], batch: int) -> None:
    model, images, labels = toy_case(Plain, count=12)
    pixels, targets, true = (images * 255).to(torch.uint8), (labels + 1) % 3, labels
    first = evaluate(model, Data(pixels, labels, pixels, targets, true), 5).metrics
    second = evaluate(model, Data(pixels[order], labels[order], pixels[order], targets[order], true[order]), batch).metrics
    assert first.headline() == second.headline()


def test_testing_more_or_less_often_changes_no_weight(colours: Path) -> None:
    """Two epochs, tested after each or after the last only; and another chunk of ranking. The seed decides alone."""
    flags = ["--epochs", "2", "--frg_samples", "1"]
    results = run_colours(colours, *flags)
    often, table = saved_weights(results), (results / "feature_maps.csv").read_bytes()
    shutil.rmtree(colours / "record" / NAME / "defense")
    results = run_colours(colours, *flags, "--frequency_test", "0", "--chunk", "40")
    assert same(often, saved_weights(results))
    assert (results / "feature_maps.csv").read_bytes() == table
    assert pd.read_csv(results / "fmp_df.csv")["test_acc"].isna().tolist() == [True, False]  # it really was tested less
    assert not same(often, saved_weights(run_colours(colours, *flags, "--random_seed", "1")))


def test_pruned_maps_of_the_report_are_zero_in_the_result(colours_run: Path, colours_template: Path, tmp_path: Path) -> None:
    shutil.copytree(colours_run.parents[3], tmp_path / "again")  # with what a former run left: its scores are used again
    results = run_colours(tmp_path / "again", "--epochs", "0")
    before = torch.load(colours_template / "record" / NAME / "attack_result.pt", weights_only=False)["model"]
    after = saved_weights(results)
    frame = pd.read_csv(results / "feature_maps.csv")
    assert int(frame["pruned"].sum()) == sum(size // 8 for size in NARROW_RESNET_MAPS.values()) == metrics(results)["pruned"]
    expected = {key: value.clone() for key, value in before.items()}
    for layer, rows in frame.groupby("layer"):
        chosen = torch.tensor(rows["channel"][rows["pruned"]].to_numpy())
        # layer1.0.conv2 is followed by layer1.0.bn2, layer2.0.downsample.0 by layer2.0.downsample.1
        norm = re.sub(r"conv(\d)$", r"bn\1", str(layer)) if "conv" in str(layer) else re.sub("0$", "1", str(layer))
        for key in (f"{layer}.weight", f"{norm}.weight", f"{norm}.bias"):
            expected[key][chosen] = 0
    assert same(after, expected)


def test_evaluation_leaves_nothing_behind_after_an_exception() -> None:
    model = toy_case(Plain)[0].train()
    before = footprint(model)
    wrong = torch.zeros(2, 7, 8, 8).byte()  # 7 channels: the first convolution raises
    with pytest.raises(RuntimeError):
        evaluate(model, Data(wrong, torch.zeros(2).long(), wrong, torch.zeros(2).long(), torch.zeros(2).long()), 4)
    assert footprint(model) == before and not torch.is_inference_mode_enabled()
