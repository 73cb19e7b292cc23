"""The trade-off of each defense as a figure: attack success rate against lost accuracy, one panel per attack."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fmp_core.errors import UserError
from fmp_core.results.collect import BASELINE
from fmp_core.results.notes import PUBLISHED, SAMPLE
from fmp_core.results.plot_style import PLAIN
from fmp_core.results.tables import Table
from fmp_core.results.titles import AVERAGE, attack_title, printable

FORMATS: dict[str, dict[str, None]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}  # without times
MARKERS = "osD^vP"
ACROSS = 3  # panels in a row
PANEL = 2.9  # inches


def write_figure(path: Path, tables: Sequence[Table]) -> None:
    """Write what :func:`draw` draws, in the format of ``FORMATS`` that the suffix of ``path`` names."""
    save(draw(tables), path)


@PLAIN
def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` in the format of ``FORMATS`` that the suffix of ``path`` names; the same figure gives the same bytes."""
    figure.savefig(path, dpi=150, metadata=FORMATS[path.suffix])


@PLAIN
def draw(tables: Sequence[Table]) -> Figure:
    """Every attack of every table as a panel. Published rows are left out: they are of other models; so are tests on a
    sample, and means that lack some records.

    Raises UserError: there is no attacked model to compare with.
    """
    panels = [(table, attack) for table in tables for attack in table.attacks if _can_be_drawn(table, attack)]
    if not panels:
        raise UserError(
            "--figure needs an attacked model and a defense of it, both tested on all test images, triggered ones "
            "among them (runs with --test_images are not drawn); there are none."
        )
    names = [name for name in dict.fromkeys(itertools.chain(*(table.methods for table in tables))) if _is_drawn(name)]
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    looks = {name: (colours[number % 10], MARKERS[number % len(MARKERS)]) for number, name in enumerate(names)}
    rows = -(-len(panels) // ACROSS)
    figure = Figure(figsize=(PANEL * min(len(panels), ACROSS) + 1.6, PANEL * rows), layout="constrained")
    for place, (table, attack) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, min(len(panels), ACROSS), place)
        _draw(axes, table, attack, looks)
        several = f"\n{printable(table.title)}" if len(tables) > 1 else ""
        axes.set_title(attack_title(attack) + several, fontsize=9)
    handles = {name: line for axes in figure.axes for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), map(printable, handles), loc="outside right upper", fontsize=8, frameon=False)
    figure.supxlabel("accuracy lost, points", fontsize=9)
    figure.supylabel("attack success rate, %", fontsize=9)
    return figure


def _is_drawn(name: str) -> bool:
    return not (name.startswith(BASELINE) or name.endswith((PUBLISHED, SAMPLE)))


def _can_be_drawn(table: Table, attack: str) -> bool:
    means = table.means[attack]
    known = means.index[means["test_asr"].notna()]  # without triggered images there is none
    return attack != AVERAGE and BASELINE in known and any(map(_is_drawn, known))


def _draw(axes: Axes, table: Table, attack: str, looks: dict[str, tuple[Any, str]]) -> None:
    """A point per method, with its standard deviations over seeds; the attacked model is a dotted line.

    Lost accuracy is counted from the test of the attacked model that DER compares with.
    """
    means, stds = table.means[attack], table.stds[attack].fillna(0)
    axes.axhline(means.loc[BASELINE, "test_asr"], color="0.5", linestyle=":", linewidth=1, label="attacked model")
    axes.axvline(0, color="0.85", linewidth=1, zorder=0)
    for name, (colour, marker) in looks.items():
        if name in means.index and means.loc[name].notna()["test_asr"] and (attack, name) not in table.partial:
            lost = table.lost[attack][name]
            bars = (stds.loc[name, "test_asr"], stds.loc[name, "test_acc"])
            point = axes.errorbar(lost, means.loc[name, "test_asr"], *bars, marker, color=colour, markersize=5)[0]
            point.set_label(name)  # the legend shows markers without bars, which would look alike
    axes.set_ylim(-4, 104)
    axes.tick_params(labelsize=8)
    axes.grid(color="0.93")
