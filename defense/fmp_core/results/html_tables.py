"""The tables as one self-contained HTML page: columns sort on a click, bars show the values, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import pandas as pd

from fmp_core.metrics import HEADLINES, LOW_IS_GOOD
from fmp_core.results.tables import PUBLISHED, Table, attack_title, printable

_PUBLISHED = "font-style: italic; color: var(--soft);"
_STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1a1c1f; --soft: #6b7280; --line: #d8dbe0;
  --good: #bfe3cb; --bad: #f6cfc6; }
@media (prefers-color-scheme: dark) {
  :root { --bg: #15171a; --fg: #e6e8eb; --soft: #9aa2ad; --line: #33373d;
    --good: #1f4d31; --bad: #5c2a20; }
}
body { background: var(--bg); color: var(--fg); font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem;
  max-width: 100rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; } p { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th[colspan] { text-align: center; } tbody th { font-weight: 400; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--bg); }
tr > :nth-child({{group}}n+3), th[colspan] { border-left: 1px solid var(--line); }
button { all: unset; cursor: pointer; font-weight: 600; } button:focus-visible { outline: 2px solid currentColor; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[1].cells], body = table.tBodies[0];
  const text = (row, column) => row.cells[column].textContent.trim();
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows], full = rows.filter(row => text(row, column) !== "-");
      const value = row => column ? parseFloat(text(row, column)) : text(row, column);
      const compare = (a, b) => column ? a - b : a.localeCompare(b);
      full.sort((a, b) => (up ? 1 : -1) * compare(value(a), value(b)));
      body.append(...full, ...rows.filter(row => text(row, column) === "-"));
    });
  });
}
"""


def to_html(tables: Sequence[Table], title: str = "Backdoor defenses") -> str:
    """A whole page without outside references; every name in it is escaped."""
    about = (
        "Percent; mean ± sample standard deviation over seeds; ratio is the share of clean data. A long green bar is good "
        "(Acc, RA, DER, RIR), a long red one bad (ASR). Click a column to sort. "
        "Bold: best of what was run here. Italic: published."
    )
    style = _STYLE.replace("{{group}}", str(len(HEADLINES)))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"<p>{about}</p>\n{''.join(_section(table, number) for number, table in enumerate(tables))}"
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _section(table: Table, number: int) -> str:
    texts = table.texts()
    texts.columns.names = [None, "Method"]
    styler = texts.style.set_uuid(f"t{number}").apply(lambda _: _css(table), axis=None)
    styler.apply_index(lambda names: ["" if not name.endswith(PUBLISHED) else _PUBLISHED for name in names])
    styler.format_index(printable, axis=0, escape="html").format_index(attack_title, axis=1, level=0, escape="html")
    styler.format_index(lambda metric: HEADLINES.get(str(metric), str(metric)), axis=1, level=1)
    notes = "".join(f"<p>{escape(printable(note))}</p>\n" for note in table.notes)
    return f'<h2>{escape(printable(table.title))}</h2>\n<div class="wide">{styler.to_html()}</div>\n{notes}'


def _css(table: Table) -> pd.DataFrame:
    """The style of each cell: its bar, bold where it is best, italic where it is published."""
    css = table.best().map({True: "font-weight: 700;", False: ""}.get)
    for attack, metric in table.columns:
        colour = f"var(--{'bad' if metric in LOW_IS_GOOD else 'good'})"
        bars = table.means[attack, metric].map(f"background: linear-gradient(90deg, {colour} {{:.1f}}%, transparent 0);".format)
        css[attack, metric] += bars.where(table.means[attack, metric].notna(), "")
    css[[name.endswith(PUBLISHED) for name in css.index]] += _PUBLISHED
    return css
