"""--tensorboard: event files where TensorBoard is installed, one clear line where it is not."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import RECORD, Ran

QUICK = ("--result_file", RECORD, "--frg_samples", "2", "--selection", "none", "--epochs", "2", "--tensorboard")


def test_every_metric_is_a_scalar(run_fmp: Callable[..., Ran], workplace: Path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run_fmp(*QUICK).code == 0
    folder = workplace / "record" / RECORD / "defense" / "fmp"
    (run,) = (folder / "tensorboard").iterdir()
    log = events.EventAccumulator(str(run)).Reload()
    table = pd.read_csv(folder / "fmp_df.csv", index_col=0)
    assert set(log.Tags()["scalars"]) == set(table.columns) - {"epoch", "batch"}
    for name in log.Tags()["scalars"]:
        assert [point.value for point in log.Scalars(name)] == pytest.approx(table[name].tolist(), rel=1e-5)


def test_without_tensorboard_nothing_is_begun(run_fmp: Callable[..., Ran], workplace: Path, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    ran = run_fmp(*QUICK)
    assert ran.code == 2 and "pip install tensorboard" in ran.err and ran.err.count("\n") == 1
    assert not (workplace / "record" / RECORD / "defense").exists()
