"""The embedded demo, end to end: a genuine BadNets record of scikit-learn's digits, and the defense on it."""

from __future__ import annotations

import json
from pathlib import Path

import fmp
import make_record
import pandas as pd
import pytest
import torch
from fmp_core.data.attack_record import read_attack_record
from fmp_core.models.build import build_model
from PIL import Image

# A stronger attack (more poison, a larger patch) than the demo's own, so that fewer epochs plant it.
ATTACK = ["--epochs", "3", "--pratio", "0.3", "--patch_size", "8", "--batch_size", "24", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the record badnet_digits and its data."""
    root = tmp_path_factory.mktemp("demo")
    where = ["--record_root", str(root / "record"), "--dataset_path", str(root / "data")]
    assert make_record.main([*ATTACK, *where]) == 0
    return root


def test_the_record_is_whole_and_backdoored(place: Path) -> None:
    folder = place / "record" / "badnet_digits"
    names = {path.name for path in folder.iterdir() if path.suffix != ".log"}
    assert names == {
        "attack_df.csv",
        "attack_df_summary.csv",
        "attack_result.pt",
        "acc_like_metric_plots.png",
        "bd_test_dataset",
        "bd_train_dataset",
        "info.pickle",
        "loss_metric_plots.png",
        "train_poison_index_list.pickle",
    }
    assert not list((place / "record").glob(".*"))
    record = read_attack_record(folder)
    assert (record.model_name, record.num_classes, record.dataset, record.image_size) == ("resnet18", 10, "digits", (32, 32, 3))
    test_files = list((place / "data" / "digits" / "test").rglob("*.png"))
    assert len(test_files) == 449 and len(list((place / "data" / "digits" / "train").rglob("*.png"))) == 1348
    assert len(record.bd_test) == sum(file.parent.name != "0" for file in test_files)
    assert (record.bd_test.pixels((32, 32, 3))[:, :, -8:, -8:] == 255).all()
    assert pd.read_csv(folder / "attack_df.csv")["test_asr"].iloc[-1] > 0.9


def test_the_defense_repairs_the_model_and_writes_everything(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--record_root", str(place / "record"), "--dataset_path", str(place / "data")]
    flags = ["--yaml_path", "./config/defense/fmp/digits.yaml", "--frg_samples", "1", "--epochs", "6", "--device", "cpu"]
    assert fmp.main(["--result_file", "badnet_digits", *where, *flags]) == 0
    results = place / "record" / "badnet_digits" / "defense" / "fmp"
    names = {path.name for path in results.iterdir() if not path.name.startswith(".")}
    assert names >= {
        "acc_like_metric_plots.png",
        "checkpoint",
        "defense_result.pt",
        "feature_maps.csv",
        "fmp_df.csv",
        "fmp_df_summary.csv",
        "index.txt",
        "log",
        "loss_metric_plots.png",
        "metrics.json",
    }
    metrics = json.loads((results / "metrics.json").read_text())
    attack = pd.read_csv(place / "record" / "badnet_digits" / "attack_df.csv").iloc[-1]
    for key in ("test_acc", "test_asr", "test_ra"):
        assert metrics["before"][key] == pytest.approx(attack[key], abs=0.005)
    assert metrics["before"]["test_asr"] > 0.9
    assert metrics["after"]["test_asr"] < 0.5 * metrics["before"]["test_asr"]
    assert metrics["after"]["test_acc"] > metrics["before"]["test_acc"] - 0.1
    assert metrics["der"] > 0.7

    table = pd.read_csv(results / "fmp_df.csv", index_col=0)
    assert table["epoch"].tolist() == [0, 1, 2, 3, 4, 5]
    assert table["batch"].tolist() == [9] * 6  # 134 images in batches of 16
    assert table.iloc[-1][["test_acc", "test_asr", "test_ra"]].to_dict() == metrics["after"]
    maps = pd.read_csv(results / "feature_maps.csv")
    assert len(maps) == metrics["feature_maps"] == 4800 and int(maps["pruned"].sum()) == metrics["pruned"] == 75
    index = [int(line) for line in (results / "index.txt").read_text().split()]
    assert len(index) == metrics["clean_images"] == 134 == len(set(index))
    assert (results / "log" / "index.txt").read_bytes() == (results / "index.txt").read_bytes()
    for name in ("acc_like_metric_plots.png", "loss_metric_plots.png"):
        with Image.open(results / name) as image:
            assert image.size == (1280, 960)

    saved = torch.load(results / "defense_result.pt", weights_only=True)
    assert list(saved) == ["model_name", "num_classes", "model"]
    build_model(saved["model_name"], saved["num_classes"]).load_state_dict(saved["model"])  # a stock model takes it
    printed = capsys.readouterr().out
    assert "before FMP" in printed and "after FMP" in printed and str(results) in printed


def test_an_existing_record_is_not_overwritten(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--record_root", str(place / "record"), "--dataset_path", str(place / "data")]
    before = (place / "record" / "badnet_digits" / "attack_result.pt").stat().st_mtime_ns
    assert make_record.main([*ATTACK, *where]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (place / "record" / "badnet_digits" / "attack_result.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--attack_target", "10"], "--attack_target 10 is not one of the 10 classes"),
        (["--pratio", "1.5"], "--pratio is 1.5"),
        (["--dataset", "cifar10"], "does not exist"),
    ],
)
def test_an_impossible_attack_is_one_sentence_and_no_record(
    place: Path, tmp_path: Path, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--record_root", str(tmp_path / "record"), "--dataset_path", str(place / "data")]
    assert make_record.main([*where, *flags]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "record").exists()
