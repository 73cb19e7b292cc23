"""TensorBoard event files, for those who have TensorBoard installed (``--tensorboard``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from fmp_core.errors import UserError


def summary_writer() -> Any:
    """torch's SummaryWriter class.

    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs TensorBoard, which is not installed; pip install tensorboard.") from None
    return SummaryWriter


def write_events(folder: Path, history: pd.DataFrame) -> None:
    """Every number of ``fmp_df.csv`` as a scalar over epochs, in one event file below ``folder``."""
    writer = summary_writer()(log_dir=str(folder))
    try:
        for _, row in history.iterrows():
            for name, value in row.drop(["epoch", "batch"]).items():
                number = pd.to_numeric(value, errors="coerce")
                if pd.notna(number):
                    writer.add_scalar(str(name), float(number), int(row["epoch"]))
    finally:
        writer.close()
