"""The tables as one self-contained HTML page: columns sort on a click, bars show the values, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fmp_core.results.tables import LOW_IS_GOOD, SHOWN, Table, attack_title, printable

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
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--bg); }
th.group { text-align: center; border-left: 1px solid var(--line); } td.first, th.first { border-left: 1px solid var(--line); }
button { all: unset; cursor: pointer; font-weight: 600; } button:focus-visible { outline: 2px solid currentColor; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
td.best { font-weight: 700; } tr.published td { font-style: italic; color: var(--soft); }
td[data-bar] { background: linear-gradient(90deg, var(--bar) var(--width), transparent 0); }
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.querySelectorAll("th[data-column]")];
  for (const head of heads) head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending", column = Number(head.dataset.column), body = table.tBodies[0];
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.value;
    const compare = (a, b) => column ? Number(a) - Number(b) : a.localeCompare(b);
    const rows = [...body.rows], full = rows.filter(row => value(row) !== ""), empty = rows.filter(row => value(row) === "");
    full.sort((a, b) => (up ? 1 : -1) * compare(value(a), value(b)));
    body.append(...full, ...empty);
  });
}
"""


def to_html(tables: Sequence[Table], title: str = "Backdoor defenses") -> str:
    """A whole page without outside references; every name in it is escaped."""
    about = "Percent; mean ± sample standard deviation over seeds. A long green bar is good (Acc, RA, DER), a long red one bad"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"<p>{about} (ASR). Click a column to sort. Bold: best of the column, the attacked model left aside.</p>\n"
        f"{''.join(_table(table) for table in tables)}<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _table(table: Table) -> str:
    first = next(iter(SHOWN))
    groups = "".join(f'<th class="group" colspan="{len(SHOWN)}">{escape(attack_title(a))}</th>' for a in table.attacks)
    heads = '<th data-column="0"><button>Method</button></th>' + "".join(
        f'<th data-column="{n}"{_first(metric == first)}><button>{SHOWN[metric]}</button></th>'
        for n, (_, metric) in enumerate(table.columns(), 1)
    )
    rows = "".join(_row(table, method) for method in table.methods)
    return (
        f'<h2>{escape(printable(table.title))}</h2>\n<div class="wide"><table>\n<thead><tr><th></th>{groups}</tr>\n'
        f"<tr>{heads}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n"
    )


def _row(table: Table, method: str) -> str:
    kind = ' class="published"' if method.endswith("(published)") else ""
    name = escape(printable(method))
    return (
        f'<tr{kind}><td data-value="{name}">{name}</td>' + "".join(_cell(table, method, c) for c in table.columns()) + "</tr>\n"
    )


def _cell(table: Table, method: str, column: tuple[str, str]) -> str:
    cell = table.cells.get((method, *column))
    classes = ["first"] * (column[1] == next(iter(SHOWN))) + ["best"] * ((method, *column) in table.best)
    attributes = f' class="{" ".join(classes)}"' if classes else ""
    if cell is None:
        return f'<td{attributes} data-value="">-</td>'
    bar = f"--bar: var(--{'bad' if column[1] in LOW_IS_GOOD else 'good'}); --width: {cell.mean:.1f}%"
    return f'<td{attributes} data-value="{cell.mean:.6f}" data-bar style="{bar}">{cell.text()}</td>'


def _first(is_first: bool) -> str:
    return ' class="first"' if is_first else ""
