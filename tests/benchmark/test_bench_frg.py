"""The benchmark runs and writes the figures it promises; it asserts no speed."""

from argparse import Namespace
from pathlib import Path

import bench_frg
import pandas as pd
import pytest
import torch
from fmp_core.benchmark import measure
from fmp_core.frg import scorer

FIGURES = {
    "ceiling_forward_images_per_s",
    "ceiling_input_grad_images_per_s",
    "engine_map_images_per_s",
    "released_map_images_per_s",
    "efficiency",
    "ratio_vs_released",
    "peak_memory_mib",
    "ours_operations_per_map",
    "released_operations_per_map",
}


def test_all_figures_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "CEILING_BATCHES", {"cpu": (4,)})
    flags = ["--model", "squeezenet1_0", "--device", "cpu", "--images", "2", "--maps", "26", "--dtype", "fp32"]
    assert bench_frg.main([*flags, "--against", "released", "--operations", "--csv", str(tmp_path / "frg.csv")]) == 0
    table = pd.read_csv(tmp_path / "frg.csv")
    assert list(table.columns) == ["device", "dtype", "figure", "value"]
    assert set(table["figure"]) >= FIGURES
    assert (table["value"] > 0).all()
    assert "efficiency" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "alexnet"], "alexnet cannot take images of 32x32"),
        (["--model", "resnet18", "--result_file", "r"], "--model and --result_file do not go together"),
        (["--csv", "nowhere/frg.csv"], "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_measured_is_one_line(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    assert bench_frg.main([*flags, "--device", "cpu", "--images", "1", "--dtype", "fp32"]) == 2
    assert says in capsys.readouterr().err


def test_forward_passes_are_timed_apart(monkeypatch: pytest.MonkeyPatch):
    """Once for all maps: they count once in a ranking, not once per sample."""
    made, plain = [], scorer.SharedForward
    monkeypatch.setattr(scorer, "SharedForward", lambda *parts: made.append(len(parts[2])) or plain(*parts))
    args = Namespace(result_file=None, model="squeezenet1_0", device="cpu", images=2, chunk=None, memory=None)
    measure.make_scorer(args, torch.float32).forward_passes()
    assert len(made) == 1 and made[0] >= 2


@pytest.mark.parametrize("flag", ["--images", "--maps", "--repeat", "--chunk", "--memory"])
def test_counts_are_at_least_one(flag: str, capsys: pytest.CaptureFixture[str]):
    assert bench_frg.main([flag, "0", "--device", "cpu"]) == 2
    assert f"{flag} is 0, but must be at least 1" in capsys.readouterr().err


def test_a_missing_record_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert bench_frg.main(["--result_file", "nothing", "--record_root", str(tmp_path), "--device", "cpu"]) == 2
    assert "does not exist" in capsys.readouterr().err
