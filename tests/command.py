"""What the tests of the command share: quick flags, where results lie, and looks at files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from conftest import RECORD, Ran
from narrow_resnet import NARROW_RESNET_MAPS

QUICK = ("--result_file", RECORD, "--frg_samples", "2", "--p", "8")
SHORT = ("--device", "cpu", "--result_file", RECORD, "--selection", "random", "--epochs", "0", "--report", "False")
MAPS = sum(NARROW_RESNET_MAPS.values())
RESULTS = Path("record") / RECORD / "defense" / "fmp"
FT_COLUMNS = [
    "epoch",
    "batch",
    "train_epoch_loss_avg_over_batch",
    "train_acc",
    "clean_test_loss_avg_over_batch",
    "bd_test_loss_avg_over_batch",
    "test_acc",
    "test_asr",
    "test_ra",
]
Run = Callable[..., Ran]
Edit = Callable[[Path, Callable[[dict[str, Any]], Any]], None]


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder below, with size and time of change."""
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, index_col=0)


def weights(root: Path) -> dict[str, torch.Tensor]:
    return torch.load(root / RESULTS / "defense_result.pt", weights_only=True)["model"]


def refuses(ran: Ran, says: str) -> None:
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("fmp: ") and ran.err.endswith("\n") and ran.err.count("\n") == 1
    assert "Traceback" not in ran.err
    assert says in ran.err
