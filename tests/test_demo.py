"""The demo: a record of scikit-learn's digits, made without BackdoorBench, and what ``make demo`` does with it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import make_record
import pandas as pd
import pytest
from fmp_core import command
from fmp_core.attacks.make_record import LOCK
from fmp_core.data.attack_record import read_attack_record
from fmp_core.settings import PROJECT
from fmp_core.storage.lock import locked
from sklearn.datasets import load_digits

# A record as the demo's in all but training, which is next to nothing.
QUICK = ["--model", "squeezenet1_0", "--limit_train", "40", "--epochs", "1", "--patch_size", "6", "--device", "cpu", "--quiet"]


def places(root: Path) -> list[str]:
    return ["--record_root", str(root / "record"), "--dataset_path", str(root / "data")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the record badnet_digits and its data."""
    root = tmp_path_factory.mktemp("demo")
    assert make_record.main([*QUICK, *places(root)]) == 0
    return root


def test_the_digits_are_divided_alike_everywhere(place: Path) -> None:
    tests = sorted((place / "data" / "digits" / "test").rglob("*.png"), key=lambda file: file.stem)
    assert [int(file.stem) for file in tests[:8]] == [5, 8, 11, 21, 23, 24, 32, 35]
    labels = load_digits().target
    assert all(int(file.parent.name) == labels[int(file.stem)] for file in tests)


def test_the_digits_are_laid_out_and_the_record_is_whole(place: Path) -> None:
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
    assert (record.num_classes, record.dataset, record.image_size) == (10, "digits", (32, 32, 3))
    test_files = list((place / "data" / "digits" / "test").rglob("*.png"))
    assert len(test_files) == 449 and len(list((place / "data" / "digits" / "train").rglob("*.png"))) == 1348
    assert len(record.bd_test) == sum(file.parent.name != "0" for file in test_files)
    assert (record.bd_test.pixels((32, 32, 3))[:, :, -6:, -6:] == 255).all()


def test_several_processes_may_lay_the_digits_out(tmp_path: Path) -> None:
    code = "from fmp_core.data.digits import make_digits; from pathlib import Path; "
    code += f"make_digits(Path({str(tmp_path / 'digits')!r}))"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "defense")}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait(600) for process in running] == [0, 0, 0]
    assert len(list((tmp_path / "digits").rglob("*.png"))) == 1797 and [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_one_process_makes_a_record(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(place / "record" / ".other.unfinished", False, name=LOCK):
        assert make_record.main([*QUICK, *places(place), "--save_folder_name", "other"]) == 2
    assert "Another make_record.py makes" in capsys.readouterr().err


def test_an_existing_record_is_not_overwritten(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (place / "record" / "badnet_digits" / "attack_result.pt").stat().st_mtime_ns
    assert make_record.main([*QUICK, *places(place)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (place / "record" / "badnet_digits" / "attack_result.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--attack_target", "10"], "--attack_target 10 is not one of the 10 classes"),
        (["--pratio", "1.5"], "--pratio is '1.5'"),
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


def demo_flags(script: str) -> list[str]:
    """The flags that ``make demo`` gives to ``script``."""
    lines = subprocess.run(["make", "-n", "demo"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.splitlines()
    (line,) = [line for line in lines if script in line]
    return shlex.split(line.partition(script)[2])


@pytest.mark.slow
def test_make_demo_removes_the_backdoor_by_a_ranking_that_ranks(tmp_path: Path) -> None:
    where = [*places(tmp_path), "--device", "cpu"]
    assert make_record.main([*demo_flags("record_scripts/make_record.py"), *where]) == 0
    assert command.main([*demo_flags("defense/fmp.py"), *where]) == 0
    results = tmp_path / "record" / "demo" / "defense" / "fmp"
    metrics = json.loads((results / "metrics.json").read_text())
    before, after = metrics["before"], metrics["after"]
    assert before["test_asr"] > 0.9 and after["test_asr"] < 0.05 and after["test_acc"] > before["test_acc"] - 0.03
    maps = pd.read_csv(results / "feature_maps.csv")
    assert len(maps) == 4800 and int(maps["pruned"].sum()) == metrics["pruned"]
    assert maps["correct"].nunique() > 1 and (results / "report.html").stat().st_size > 0
