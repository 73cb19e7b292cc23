"""The tables as one self-contained HTML page: columns sort on a click, bars show the values, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2
import pandas as pd

from fmp_core.metrics import HEADLINES, LOW_IS_GOOD
from fmp_core.results.tables import PUBLISHED, Table, attack_title, printable

_ASSETS = Path(__file__).parent / "assets"
_ITALIC = "font-style: italic; color: var(--soft);"


def to_html(tables: Sequence[Table]) -> str:
    """A whole page without outside references; every name in it is escaped."""
    loader = jinja2.FileSystemLoader(_ASSETS)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["printable"] = printable
    grids = [_grid(table, number) for number, table in enumerate(tables)]
    return environment.get_template("tables.html").render(tables=tables, grids=grids, group=len(HEADLINES))


def _grid(table: Table, number: int) -> str:
    texts = table.texts()
    texts.columns.names = [None, "Method"]
    styler = texts.style.set_uuid(f"t{number}").apply(lambda _: _css(table), axis=None)
    styler.apply_index(lambda names: [_ITALIC if name.endswith(PUBLISHED) else "" for name in names])
    styler.format_index(printable, axis=0, escape="html").format_index(attack_title, axis=1, level=0, escape="html")
    styler.format_index(lambda metric: HEADLINES.get(str(metric), str(metric)), axis=1, level=1)
    return str(styler.to_html())


def _css(table: Table) -> pd.DataFrame:
    """The style of each cell: its bar, bold where it is best, italic where it is published."""
    css = table.best().map({True: "font-weight: 700;", False: ""}.get)
    for (attack, metric), means in table.means.items():  # type: ignore[misc]
        colour = f"var(--{'bad' if metric in LOW_IS_GOOD else 'good'})"
        bars = means.map(f"background: linear-gradient(90deg, {colour} {{:.1f}}%, transparent 0);".format)
        css[attack, metric] += bars.where(means.notna(), "")
    css[css.index.str.endswith(PUBLISHED)] += _ITALIC
    return css
