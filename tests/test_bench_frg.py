"""The benchmark runs and writes the figures it promises; it asserts no speed."""

from pathlib import Path

import bench_frg
import pandas as pd
import pytest
from fmp_core.frg import benchmark

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
    monkeypatch.setattr(benchmark, "CEILING_BATCHES", {"cpu": (4,)})
    flags = ["--model", "squeezenet1_0", "--device", "cpu", "--images", "2", "--maps", "26", "--dtype", "fp32"]
    assert bench_frg.main([*flags, "--against", "released", "--operations", "--csv", str(tmp_path / "frg.csv")]) == 0
    table = pd.read_csv(tmp_path / "frg.csv")
    assert list(table.columns) == ["device", "dtype", "figure", "value"]
    assert set(table["figure"]) >= FIGURES
    assert (table["value"] > 0).all()
    assert "efficiency" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--images", "--maps", "--repeat", "--chunk", "--memory"])
def test_counts_are_at_least_one(flag: str, capsys: pytest.CaptureFixture[str]):
    assert bench_frg.main([flag, "0", "--device", "cpu"]) == 2
    assert f"{flag} is 0, but must be at least 1" in capsys.readouterr().err


def test_a_missing_record_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert bench_frg.main(["--result_file", "nothing", "--record_root", str(tmp_path), "--device", "cpu"]) == 2
    assert "does not exist" in capsys.readouterr().err
