"""A training, epoch by epoch: BackdoorBench's csv files and plots, and TensorBoard's event files (``--tensorboard``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fmp_core.errors import UserError, in_one_line
from fmp_core.models.evaluate import Metrics
from fmp_core.models.training import Epoch
from fmp_core.results.plot_style import PLAIN
from fmp_core.storage.files import replacing

# The columns of BB's ft_df.csv after those of an epoch, in its order (``utils/trainer_cls.py``, Metric_Aggregator).
TEST_COLUMNS = ["clean_test_loss_avg_over_batch", "bd_test_loss_avg_over_batch", "test_acc", "test_asr", "test_ra"]
# label, column, marker, line: as BB's plot_loss and plot_acc_like_metric_pure draw them
LOSSES = [
    ("Train Loss", "train_epoch_loss_avg_over_batch", "o", "--"),
    ("Test Clean loss", "clean_test_loss_avg_over_batch", "v", "-"),
    ("Test Backdoor Loss", "bd_test_loss_avg_over_batch", "+", "-."),
]
ACCURACIES = [
    ("Train Acc", "train_acc", "o", "--"),
    ("Test C-Acc", "test_acc", "o", "--"),
    ("Test ASR", "test_asr", "v", "-"),
    ("Test RA", "test_ra", "+", "-."),
]


def history_frame(rows: Sequence[tuple[Epoch | None, Metrics | None]]) -> pd.DataFrame:
    """BB's per-epoch table: object dtype (so integers stay integers), NaN as the text ``nan_value``, untested cells empty.

    A subclass of :class:`Epoch` adds its fields as columns.
    """
    kind = next((type(epoch) for epoch, _ in rows if epoch is not None), Epoch)
    records = []
    for number, parts in enumerate(rows):
        row: dict[str, Any] = {"epoch": number, "batch": 0}
        for part in parts:
            row |= {} if part is None else dataclasses.asdict(part)
        records.append({key: "nan_value" if value != value else value for key, value in row.items()})
    columns = [*(field.name for field in dataclasses.fields(kind)), *TEST_COLUMNS]
    return pd.DataFrame(records, columns=columns, dtype=object)


def summary_frame(history: pd.DataFrame) -> pd.DataFrame:
    """BB's three-row summary: the last value present, the largest number, whether ``nan_value`` occurs."""

    def summarise(column: pd.Series) -> pd.Series:
        present = column.dropna()
        numbers = pd.to_numeric(present, errors="coerce")
        values = [present.iloc[-1] if len(present) else None, numbers.max(), bool((present == "nan_value").any())]
        return pd.Series(values, index=["last", "valid_max", "exist_nan_value"], dtype=object)

    return history.apply(summarise)


def write_csv(path: Path, frame: pd.DataFrame, index: bool = True) -> None:
    """Write a table, whole or not at all."""
    with replacing(path) as temporary:
        frame.to_csv(temporary, index=index)


def read_table(path: Path, columns: Sequence[str], **how: Any) -> pd.DataFrame:
    """What :func:`write_csv` wrote, which has ``columns``; ``how`` as of pandas. Raises UserError: missing or damaged."""
    try:
        if not path.is_file():  # a pipe would never end
            raise OSError("no such file")
        frame = pd.read_csv(path, **how)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({in_one_line(error, 120)}); run the defense again.") from None
    if missing := [name for name in columns if name not in frame]:
        raise UserError(f"{path} is no result of fmp: it has no column {missing[0]}; run the defense again.")
    return frame


def write_plots(folder: Path, history: pd.DataFrame) -> None:
    """BB's ``loss_metric_plots.png`` and ``acc_like_metric_plots.png`` (1280x960, title "Results")."""
    _plot(folder / "loss_metric_plots.png", history, LOSSES, "Loss", None)
    _plot(folder / "acc_like_metric_plots.png", history, ACCURACIES, "ACC", 1.0)


@PLAIN
def _plot(path: Path, history: pd.DataFrame, lines: list[tuple[str, str, str, str]], ylabel: str, top: float | None) -> None:
    figure = Figure(figsize=(12.8, 9.6), dpi=100)
    axes = figure.add_subplot(111)
    colours = matplotlib.colormaps["gist_rainbow"](np.linspace(0, 1, len(lines), endpoint=False))
    for (label, column, marker, style), colour in zip(lines, colours, strict=True):
        values = pd.to_numeric(history[column], errors="coerce").dropna()
        epochs = history["epoch"][values.index]
        axes.plot(epochs, values, marker=marker, linestyle=style, linewidth=2, label=label, color=colour)
    axes.set(xlabel="Epochs", ylabel=ylabel, title="Results")
    axes.set_ylim(bottom=0, top=top)
    axes.legend()
    axes.grid()
    with replacing(path) as temporary:
        figure.savefig(temporary)


def summary_writer() -> Any:
    """torch's SummaryWriter class. Raises UserError: TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs TensorBoard, which is not installed; pip install tensorboard.") from None
    return SummaryWriter


def write_events(folder: Path, history: pd.DataFrame) -> None:
    """Every number of ``fmp_df.csv`` as a scalar over epochs, in one event file below ``folder``."""
    with summary_writer()(log_dir=str(folder)) as writer:
        for name in history.columns.drop(["epoch", "batch"]):
            for row, number in pd.to_numeric(history[name], errors="coerce").dropna().items():
                writer.add_scalar(name, float(number), int(history["epoch"][row]))
