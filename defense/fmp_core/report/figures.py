"""The report's charts: matplotlib drawings as inline SVG whose colours follow the page (light or dark)."""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fmp_core.results.plot_style import DEFAULTS

# Drawn in these colours, shown in the style sheet's variables: an SVG cannot name a CSS variable through matplotlib.
INK, SOFT, RULE, BEFORE, AFTER, TRIGGER = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
VARIABLES = {INK: "--ink", SOFT: "--soft", RULE: "--rule", BEFORE: "--before", AFTER: "--after", TRIGGER: "--trigger"}
STYLE = matplotlib.style.context([*DEFAULTS, Path(__file__).parent / "assets" / "report.mplstyle"])  # in the same colours
SHARES = {  # of fmp_df.csv: column -> (label, colour)
    "train_acc": ("train Acc", BEFORE),
    "test_acc": ("Acc", INK),
    "test_ra": ("RA", AFTER),
    "test_asr": ("ASR", TRIGGER),
}
LOSSES = {
    "train_epoch_loss_avg_over_batch": ("train", BEFORE),
    "clean_test_loss_avg_over_batch": ("clean test", INK),
    "bd_test_loss_avg_over_batch": ("triggered test", TRIGGER),
}
CELL = (0.0, 0.45, 0.70)  # blue on any ground: only its opacity varies
MOST_OPAQUE = 0.6  # so that ink stays readable on the fullest cell
WIDTH = 4.6  # inches; one column of the page, or the whole of a phone
MOST_CLASSES = 30  # per-class bars


@STYLE
def confusion_matrix(counts: np.ndarray, label: str) -> str:
    """Rows (true classes) as shares; numbers are percent, written where there is room for them and at least 1."""
    classes = len(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axes = _axes(WIDTH * 0.94)
    axes.spines[:].set_visible(False)
    cells = np.empty((classes, classes, 4))
    cells[..., :3], cells[..., 3] = CELL, MOST_OPAQUE * shares
    axes.imshow(cells, interpolation="none", aspect="auto")
    if classes <= 12:
        for row, column in np.argwhere(shares >= 0.01):
            axes.text(column, row, f"{100 * shares[row, column]:.0f}", ha="center", va="center", fontsize=9, color=INK)
        axes.set(xticks=range(classes), yticks=range(classes))
    axes.set(xlabel="predicted class", ylabel="true class")
    return _svg(figure, label)


@STYLE
def success_by_class(table: pd.DataFrame) -> str:
    """ASR of each true class before and after; of many classes, those of highest ASR after."""
    shown = table.sort_values("after", ascending=False).head(MOST_CLASSES).sort_index()
    figure, axes = _axes(0.75 + 0.27 * len(shown))
    axes.spines["left"].set_visible(False)
    rows = np.arange(len(shown))
    axes.hlines(rows, 100 * shown["after"], 100 * shown["before"], color=RULE, linewidth=3)
    axes.plot(100 * shown["before"], rows, "o", color=BEFORE, markersize=6, label="before")
    axes.plot(100 * shown["after"], rows, "o", color=AFTER, markersize=6, label="after")
    axes.set_yticks(rows, [str(label) for label in shown.index])
    axes.set(xlim=(-2, 102), ylim=(len(shown) - 0.5, -0.5), xlabel="ASR, %", ylabel="true class")
    axes.grid(axis="x")
    _legend(axes, 2)
    return _svg(figure, "Attack success rate per true class, before and after")


@STYLE
def training_curves(history: pd.DataFrame, columns: dict[str, tuple[str, str]], what: str, percent: bool) -> str:
    """Lines over epochs; ``columns`` maps a column to its (label, colour). Untested epochs and columns are passed over."""
    figure, axes = _axes(2.9)
    for (name, (label, colour)), dash in zip(columns.items(), ("-", "--", "-.", ":"), strict=False):
        values = pd.to_numeric(history[name], errors="coerce").astype(float) * (100 if percent else 1)
        there = np.isfinite(values)
        if not there.any():
            continue
        axes.plot(history["epoch"][there] + 1, values[there], dash, marker="o", markersize=3.5, color=colour, label=label)
    axes.set_xlabel("epoch")
    highest = axes.dataLim.y1  # infinite if no value is finite
    axes.set_ylim(0, 102 if percent else 1.08 * highest if np.isfinite(highest) and highest > 0 else 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    if axes.lines:
        _legend(axes, len(columns))
    return _svg(figure, f"{what} over fine-tuning epochs")


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")
    return figure, figure.add_subplot(111, facecolor="none")


def _legend(axes: Axes, columns: int) -> None:
    spacing = {"borderaxespad": 0.2, "borderpad": 0, "handlelength": 1.6, "columnspacing": 1.4}
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, **spacing)


def _svg(figure: Figure, label: str) -> str:
    """The drawing as one ``<svg>`` element, ``label`` its text for screen readers; ``label`` must be plain."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', text, count=1)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text
