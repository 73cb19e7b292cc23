"""Tables of Acc / ASR / RA / DER per attack, one row per method, as the paper prints them: text, Markdown, LaTeX."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import pandas as pd

from fmp_core.results.collect import BASELINE

AVERAGE = "AVG"
SHOWN = {"test_acc": "Acc", "test_asr": "ASR", "test_ra": "RA", "der": "DER"}
LOW_IS_GOOD = {"test_asr"}
ATTACK_TITLES = {
    "badnet": "BadNets",
    "blended": "Blended",
    "lf": "Low Frequency",
    "ssba": "SSBA",
    "wanet": "WaNet",
    "sig": "SIG",
}
SETTING = ["dataset", "model", "pratio"]


class Cell(NamedTuple):
    """Percent: the mean over seeds, and the sample standard deviation where there are several."""

    mean: float
    std: float | None = None

    def text(self, between: str = "±") -> str:
        return f"{self.mean:.2f}" + ("" if self.std is None else f"{between}{self.std:.2f}")


@dataclass(frozen=True)
class Table:
    """One dataset, model and poison rate. ``cells`` and ``best`` are keyed (method, attack, metric)."""

    title: str
    methods: Sequence[str]
    attacks: Sequence[str]
    cells: dict[tuple[str, str, str], Cell]
    best: frozenset[tuple[str, str, str]]

    def columns(self) -> list[tuple[str, str]]:
        return [(attack, metric) for attack in self.attacks for metric in SHOWN]

    def value(self, method: str, column: tuple[str, str], missing: str = "-", between: str = "±") -> str:
        cell = self.cells.get((method, *column))
        return cell.text(between) if cell else missing


def build_tables(frame: pd.DataFrame) -> list[Table]:
    """One table per dataset, model and poison rate in the tidy table of :func:`fmp_core.results.collect.collect`.

    A column is an attack; records of one attack that differ in their seed are averaged, other records of the same attack keep
    their own column, named after the record. AVG is there for methods that were run on every attack. The best of a column,
    the attacked model left aside, is in ``best``.
    """
    if frame.empty:
        return []
    frame = frame.assign(column=_columns(frame))
    tables = []
    for values, part in frame.groupby(SETTING, dropna=False, sort=True):
        dataset, model, pratio = cast(tuple[Any, Any, Any], values)
        known = [_text(dataset), _text(model), "" if pd.isna(pratio) else f"poison rate {100 * pratio:g} %"]
        tables.append(_table(", ".join(text for text in known if text) or "unknown setting", part))
    return tables


def _columns(frame: pd.DataFrame) -> pd.Series:
    """The column each row belongs to: its attack, or its record where the attack's name alone would mix different records."""
    records = frame[frame["origin"] != "published"].drop_duplicates("record")
    mixed = records[records.duplicated([*SETTING, "attack", "record_seed"], keep=False) | records["attack"].isna()]
    by_record = frame["record"].isin(set(mixed["record"]))
    return frame["attack"].where(~by_record, frame["record"])


def _table(title: str, part: pd.DataFrame) -> Table:
    attacks = [name for name in ATTACK_TITLES if name in set(part["column"])]
    attacks += sorted(set(part["column"]) - set(attacks))
    methods = sorted(set(part["method"]), key=_method_order)
    cells: dict[tuple[str, str, str], Cell] = {}
    for group, rows in part.groupby(["method", "column"]):
        method, attack = cast(tuple[str, str], group)
        for metric in SHOWN:
            values = 100 * pd.to_numeric(rows[metric], errors="coerce").dropna()
            if len(values):
                cells[method, attack, metric] = Cell(values.mean(), values.std() if len(values) > 1 else None)
    if len(attacks) > 1:
        for method in methods:
            for metric in SHOWN:
                over = [cells.get((method, attack, metric)) for attack in attacks]
                if all(over):
                    cells[method, AVERAGE, metric] = Cell(sum(cell.mean for cell in over if cell) / len(over))
        attacks.append(AVERAGE)
    return Table(title, methods, attacks, cells, _best(methods, attacks, cells))


def _method_order(name: str) -> tuple[bool, bool, list[tuple[int, str]]]:
    """The attacked model first, published rows last; fmp-p4 before fmp-p16."""
    parts = [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
    return not name.startswith(BASELINE), name.endswith("(published)"), parts


def _best(methods: Sequence[str], attacks: Sequence[str], cells: dict[tuple[str, str, str], Cell]) -> frozenset:
    best = set()
    for attack in attacks:
        for metric in SHOWN:
            column = [(m, attack, metric) for m in methods if not m.startswith(BASELINE) and (m, attack, metric) in cells]
            means = [round(cells[key].mean, 2) for key in column]
            if len(column) > 1:
                wanted = min(means) if metric in LOW_IS_GOOD else max(means)
                best |= {key for key, mean in zip(column, means, strict=True) if mean == wanted}
    return frozenset(best)


def printable(text: object) -> str:
    """``text`` without control characters: names come from folders that others made, and terminals obey escapes."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def attack_title(name: str) -> str:
    """An attack's name as papers write it; an unknown one as it is, without control characters."""
    return printable(ATTACK_TITLES.get(name, name))


def to_text(table: Table, width: int = 128) -> str:
    """For a terminal: as many attacks side by side as fit ``width``; the best of a column has a star."""
    first = max(len(printable(name)) for name in ("method", *table.methods)) + 1

    def cell(method: str, column: tuple[str, str]) -> str:
        return table.value(method, column) + ("*" if (method, *column) in table.best else " ")

    wide = {
        attack: max(8, *(len(cell(method, (attack, metric))) + 1 for method in table.methods for metric in SHOWN))
        for attack in table.attacks
    }
    blocks: list[list[str]] = [[]]
    for attack in table.attacks:
        if blocks[-1] and first + len(SHOWN) * sum(wide[name] for name in [*blocks[-1], attack]) > width:
            blocks.append([])
        blocks[-1].append(attack)
    lines = [f"{printable(table.title)} (percent; * best)"]
    for block in blocks:
        lines.append(" " * first + "".join(f"{attack_title(a)[: 4 * wide[a] - 2]:>{len(SHOWN) * wide[a] - 1}} " for a in block))
        lines.append(f"{'method':<{first}}" + "".join(f"{name:>{wide[a] - 1}} " for a in block for name in SHOWN.values()))
        for method in table.methods:
            values = "".join(f"{cell(method, (a, metric)):>{wide[a]}}" for a in block for metric in SHOWN)
            lines.append(f"{printable(method):<{first}}{values}")
        lines.append("")
    return "\n".join(line.rstrip() for line in lines)


def to_markdown(table: Table) -> str:
    """One wide table; the best of a column is bold. Names are escaped: they come from records."""

    def plain(text: str) -> str:
        return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", printable(text))

    def cell(method: str, column: tuple[str, str]) -> str:
        text = table.value(method, column)
        return f"**{text}**" if (method, *column) in table.best else text

    head = ["Method", *(f"{plain(attack_title(a))} {SHOWN[m]}" for a, m in table.columns())]
    rows = [head, ["---", *("---:" for _ in head[1:])]]
    rows += [[plain(method), *(cell(method, column) for column in table.columns())] for method in table.methods]
    return f"**{plain(table.title)}** (percent)\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def to_latex(table: Table) -> str:
    """A booktabs table (``\\usepackage{booktabs}``), the best in bold, mean ± std over seeds."""

    def cell(method: str, column: tuple[str, str]) -> str:
        text = table.value(method, column, between=r"\,$\pm$\,")
        return rf"\textbf{{{text}}}" if (method, *column) in table.best else text

    span = len(SHOWN)
    groups = " & ".join(rf"\multicolumn{{{span}}}{{c}}{{{latex(attack_title(a))}}}" for a in table.attacks)
    rules = " ".join(rf"\cmidrule(lr){{{2 + span * i}-{1 + span * (i + 1)}}}" for i in range(len(table.attacks)))
    arrows = {m: name + (r" $\downarrow$" if m in LOW_IS_GOOD else r" $\uparrow$") for m, name in SHOWN.items()}
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{Acc, ASR, RA and DER in percent. {latex(printable(table.title))}.}}",
        rf"\begin{{tabular}}{{l{'r' * span * len(table.attacks)}}}",
        r"\toprule",
        rf"& {groups} \\",
        rules,
        rf"Method & {' & '.join(arrows[m] for _, m in table.columns())} \\",
        r"\midrule",
        *(
            rf"{latex(printable(method))} & {' & '.join(cell(method, column) for column in table.columns())} \\"
            for method in table.methods
        ),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def latex(text: str) -> str:
    """``text`` with LaTeX's special characters escaped."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(char, rf"\{char}" if char in "&%$#_{}" else char) for char in text)


def _text(value: Any) -> str:
    return "" if value is None or pd.isna(value) else str(value)


RENDERERS: dict[str, Callable[[Table], str]] = {"text": to_text, "markdown": to_markdown, "latex": to_latex}
