"""What a run leaves behind: BackdoorBench's csv files and plots, and our feature_maps.csv and metrics.json."""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
import torchvision
from matplotlib.figure import Figure

from fmp_core import __version__
from fmp_core.frg.scorer import Choice, Scores
from fmp_core.models.evaluate import Metrics
from fmp_core.models.feature_maps import ConvLayer
from fmp_core.models.training import Epoch
from fmp_core.storage.files import replacing, write_text

# The columns of BB's ft_df.csv after those of an epoch, in its order (``utils/trainer_cls.py``, Metric_Aggregator).
TEST_COLUMNS = [
    "clean_test_loss_avg_over_batch",
    "bd_test_loss_avg_over_batch",
    "test_acc",
    "test_asr",
    "test_ra",
]


def history_frame(rows: Sequence[tuple[Epoch | None, Metrics | None]]) -> pd.DataFrame:
    """BB's per-epoch table: object dtype (so integers stay integers), NaN as the text ``nan_value``, untested cells empty.

    A subclass of :class:`Epoch` adds its fields as columns.
    """
    kind = next((type(epoch) for epoch, _ in rows if epoch is not None), Epoch)
    columns = [*(field.name for field in dataclasses.fields(kind)), *TEST_COLUMNS]
    records = []
    for number, (epoch, metrics) in enumerate(rows):
        row: dict[str, Any] = {"epoch": number, "batch": 0}
        for part in (epoch, metrics):
            row.update({} if part is None else dataclasses.asdict(part))
        records.append({key: "nan_value" if value != value else value for key, value in row.items()})
    return pd.DataFrame(records, columns=columns, dtype=object)


def summary_frame(history: pd.DataFrame) -> pd.DataFrame:
    """BB's three-row summary: the last value present, the largest number, whether ``nan_value`` occurs."""

    def summarise(column: pd.Series) -> pd.Series:
        present = column[~column.isna()]
        numbers = pd.to_numeric(present, errors="coerce")
        values = [present.iloc[-1] if len(present) else None, numbers.max(), bool((present == "nan_value").any())]
        return pd.Series(values, index=["last", "valid_max", "exist_nan_value"], dtype=object)

    return history.apply(summarise)


def feature_map_frame(layers: Sequence[ConvLayer], choice: Choice, scores: Scores | None, scope: str) -> pd.DataFrame:
    """One row per feature map; ``rank`` 1 is the lowest score of those ``scope`` compares.

    Maps that racing dropped have no margin. Without scores there is no rank; maps that a inverted trigger chose have ``moved``.
    """
    columns: dict[str, Any] = {
        "layer": [layer.name for layer in layers for _ in range(layer.channels)],
        "channel": [channel for layer in layers for channel in range(layer.channels)],
    }
    if scores is not None:
        rank = np.empty(scores.total, dtype=np.int64)
        rank[scores.order().numpy()] = np.arange(1, scores.total + 1)
        margin = scores.margin if scores.settled is None else scores.margin.where(scores.settled, torch.nan)
        columns |= {"correct": scores.correct.numpy(), "samples": scores.samples, "margin": margin.numpy(), "rank": rank}
    if choice.moved is not None:
        columns["moved"] = choice.moved.numpy()
    frame = pd.DataFrame({**columns, "pruned": choice.mask.numpy()})
    if scores is not None and scope == "layer":
        frame["rank"] = frame.groupby("layer", sort=False)["rank"].rank(method="first").astype(np.int64)
    return frame


def write_csv(path: Path, frame: pd.DataFrame, index: bool = True) -> None:
    """Write a table, whole or not at all."""
    with replacing(path) as temporary:
        frame.to_csv(temporary, index=index)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


# label, column, marker, line: as BB's plot_loss and plot_acc_like_metric_pure draw them
_LOSSES = [
    ("Train Loss", "train_epoch_loss_avg_over_batch", "o", "--"),
    ("Test Clean loss", "clean_test_loss_avg_over_batch", "v", "-"),
    ("Test Backdoor Loss", "bd_test_loss_avg_over_batch", "+", "-."),
]
_ACCURACIES = [
    ("Train Acc", "train_acc", "o", "--"),
    ("Test C-Acc", "test_acc", "o", "--"),
    ("Test ASR", "test_asr", "v", "-"),
    ("Test RA", "test_ra", "+", "-."),
]


def write_plots(folder: Path, history: pd.DataFrame) -> None:
    """BB's ``loss_metric_plots.png`` and ``acc_like_metric_plots.png`` (1280x960, title "Results")."""
    _plot(folder / "loss_metric_plots.png", history, _LOSSES, "Loss", None)
    _plot(folder / "acc_like_metric_plots.png", history, _ACCURACIES, "ACC", 1.0)


def _plot(path: Path, history: pd.DataFrame, lines: list[tuple[str, str, str, str]], ylabel: str, top: float | None) -> None:
    figure = Figure(figsize=(12.8, 9.6), dpi=100)
    axes = figure.add_subplot(111)
    colours = matplotlib.colormaps["gist_rainbow"](np.linspace(0, 1, len(lines), endpoint=False))
    for (label, column, marker, style), colour in zip(lines, colours, strict=True):
        values = pd.to_numeric(history[column], errors="coerce")
        shown = values.notna()
        axes.plot(
            history["epoch"][shown], values[shown], marker=marker, linestyle=style, linewidth=2, label=label, color=colour
        )
    axes.set(xlabel="Epochs", ylabel=ylabel, title="Results")
    axes.set_ylim(bottom=0, top=top)
    axes.legend()
    axes.grid()
    with replacing(path) as temporary:
        figure.savefig(temporary)


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the commit of this checkout (``unknown`` outside git)."""
    return {
        "fmp": __version__,
        "git": git_hash(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "pandas": pd.__version__,
    }


def git_hash() -> str:
    """Commit of the checkout this file lies in, ``-dirty`` if it has changes, ``unknown`` if it is none."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def table(metrics: dict[str, Any]) -> str:
    """A small text table of Acc / ASR / RA in percent before and after, from the content of ``metrics.json``."""
    lines = [f"{'percent':<16}{'Acc':>8}{'ASR':>8}{'RA':>8}"]
    for row in ("before", "after"):
        values = (metrics[row][key] for key in ("test_acc", "test_asr", "test_ra"))
        lines.append(f"{row + ' FMP':<16}" + "".join(f"{100 * value:8.2f}" for value in values))
    return "\n".join(lines)
