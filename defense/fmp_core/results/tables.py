"""Tables of Acc / ASR / RA / DER / RIR per attack, one row per method, as papers print them, in every format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import jinja2
import pandas as pd

from fmp_core.metrics import HEADLINES, LOW_IS_GOOD
from fmp_core.results.collect import BASELINE
from fmp_core.results.notes import (
    PUBLISHED,
    SAMPLE,
    notes_of_minutes,
    notes_of_mixtures,
    notes_of_partial,
    notes_of_shares,
    partial_means,
)
from fmp_core.results.titles import ALL_TO_ALL, ATTACK_TITLES, AVERAGE, attack_title, printable

ASSETS = Path(__file__).parent / "assets"
ITALIC = "font-style: italic; color: var(--soft);"
ABOUT = ["ratio", "minutes"]  # the first columns: share of clean data, and what a run takes
ORACLE = "ablate-oracle"  # begins rows of ablate.py that see the trigger
SETTING = ["dataset", "model", "pratio"]


@dataclass(frozen=True)
class Table:
    """One dataset, model and poison rate.

    ``means`` and ``stds`` are percent over seeds, a row per method and a column per (attack, metric); NaN where nothing was
    run, ``stds`` also where there is one seed. ``about`` has the columns :data:`ABOUT`, as text. ``notes`` are sentences that
    belong below the table. ``lost``: accuracy lost, in points, since the test of the attacked model that DER compares with, a
    row per method and a column per attack. ``partial``: the (attack, method) that lack one of the attack's records.
    """

    title: str
    means: pd.DataFrame
    stds: pd.DataFrame
    about: pd.DataFrame
    lost: pd.DataFrame
    notes: Sequence[str] = field(default=())
    partial: frozenset[tuple[str, str]] = frozenset()

    @property
    def methods(self) -> list[str]:
        return list(self.means.index)

    @property
    def attacks(self) -> list[str]:
        return list(dict.fromkeys(self.means.columns.get_level_values(0)))

    def texts(self, between: str = "±") -> pd.DataFrame:
        """What the cells say: ``92.00``, ``92.00±1.41`` over seeds, or ``-``; the first columns are ``ABOUT``."""
        texts = self.means.map("{:.2f}".format) + self.stds.map((between + "{:.2f}").format).where(self.stds.notna(), "")
        texts = texts.where(self.means.notna(), "-")
        return self._after(self.about, texts)

    def best(self) -> pd.DataFrame:
        """Whether a cell is the best of its column, in the shape of :meth:`texts`.

        Only what was run here on whole test sets, and all records, competes: not the attacked model, no published row
        (another model), no oracle.
        """
        competes = [not (name.startswith((BASELINE, ORACLE)) or name.endswith((PUBLISHED, SAMPLE))) for name in self.methods]
        rounded = self.means[competes].round(2)
        for attack, method in self.partial & {(attack, method) for attack in self.attacks for method in rounded.index}:
            rounded.loc[method, [attack, *({AVERAGE} & {*self.attacks})]] = float("nan")
        low = [metric in LOW_IS_GOOD for _, metric in rounded.columns]
        target = rounded.min().where(low, rounded.max()).where(rounded.count() > 1)
        best = rounded.eq(target).reindex(self.means.index, fill_value=False)
        return self._after(pd.DataFrame(False, best.index, ABOUT), best)

    @staticmethod
    def _after(about: pd.DataFrame, rest: pd.DataFrame) -> pd.DataFrame:
        return pd.concat({"": about}, axis=1).join(rest)


def build_tables(frame: pd.DataFrame) -> list[Table]:
    """One table per dataset, model and poison rate in the tidy table of :func:`fmp_core.results.collect.collect`.

    A column is an attack, all-to-all another one; records of one attack that differ in their seed are averaged, other records
    of the same attack keep their own column, named after the record. Results of one method that differ in more than their seed
    keep rows of their own, named after their folders, and where these are alike also by their ``settings_digest``. AVG is over
    the columns, for methods that have them all. What was tested on a sample of the test images has a row of its own, which says
    so.
    """
    frame = frame.assign(column=_columns(frame))
    frame["method"] = frame["method"].mask(_differ(frame), frame["defense"])
    digests = frame["settings_digest"].astype(object).fillna("unknown").astype(str)
    with_settings = frame["method"] + " (settings " + digests + ")"
    frame["method"] = frame["method"].mask(_differ(frame), with_settings)  # folders of one name on several records
    on_sample = frame["method"] + " (" + frame["test_images"].astype(str) + SAMPLE
    frame["method"] = frame["method"].where(frame["test_images"].isna(), on_sample)
    tables = []
    for values, part in frame.groupby(SETTING, dropna=False, sort=True):
        dataset, model, pratio = cast(tuple[Any, Any, Any], values)
        rate = f"poison rate {100 * pratio:g} %" if pd.notna(pratio) else None
        title = ", ".join(str(text) for text in (dataset, model, rate) if pd.notna(text) and text)
        tables.append(_table(title or "unknown setting", part))
    return tables


def _differ(frame: pd.DataFrame) -> pd.Series:
    """Whether results that would be averaged as seeds of one method were made with other settings, or the seed is the same.

    On one attack is enough: a row must mean the same on all.
    """
    settings = frame.groupby([*SETTING, "column", "method"], dropna=False)["settings_digest"]
    twice = frame.duplicated(["record", "method", "seed", "test_images"], keep=False) & frame["seed"].notna()
    found = (settings.transform(lambda digests: digests.nunique(dropna=False)) > 1) | twice
    return found.groupby([*(frame[key] for key in SETTING), frame["method"]], dropna=False).transform("any")


def _columns(frame: pd.DataFrame) -> pd.Series:
    """The column each row belongs to: its attack, or its record where the attack's name alone would mix different records."""
    attack = frame["attack"].mask(frame["target"].eq("all-to-all").fillna(False), frame["attack"] + ALL_TO_ALL)
    records = frame.assign(attack=attack)[frame["origin"] != "published"].drop_duplicates("record")
    several = records.groupby([*SETTING, "attack"], dropna=False)["record_digest"].transform("nunique") > 1
    twice = records.duplicated([*SETTING, "attack", "record_seed"], keep=False)
    mixed = records[several | twice | records["attack"].isna()]
    taken = frame["record"].isin({*attack.dropna(), AVERAGE})  # by the column of an attack
    names = frame["record"].mask(taken, "record " + frame["record"])
    return attack.where(~frame["record"].isin(set(mixed["record"])), names)


def _table(title: str, part: pd.DataFrame) -> Table:
    attacks = sorted(set(part["column"]), key=_attack_order)
    methods = sorted(set(part["method"]), key=_method_order)
    long = part.melt(["method", "column"], list(HEADLINES), var_name="metric")
    long["value"] = 100 * pd.to_numeric(long["value"], errors="coerce")
    over_seeds = long.groupby(["method", "column", "metric"])["value"]
    columns = pd.MultiIndex.from_product([attacks, HEADLINES])
    mean = over_seeds.agg(_mean_of_all)
    means, stds = (
        values.unstack([1, 2]).reindex(index=pd.Index(methods), columns=columns)
        for values in (mean, over_seeds.std().where(mean.notna()))
    )
    if len(attacks) > 1:
        run_here = sorted(set(part.loc[part["origin"] != "published", "column"]))
        published = means.index.str.endswith(PUBLISHED)
        for metric in HEADLINES:
            by_attack = means.xs(metric, axis=1, level=1)
            average = by_attack[run_here].mean(
                axis=1, skipna=False
            )  # a published attack that was not run here counts there only
            means[AVERAGE, metric] = average.mask(published, by_attack.mean(axis=1, skipna=False))
        stds = stds.reindex(columns=means.columns)
    shares = {method: sorted(set(part.loc[part["method"] == method, "ratio"].dropna())) for method in methods}
    shown = [", ".join(f"{share:g}" for share in shares[method]) or "-" for method in methods]
    about = pd.DataFrame({"ratio": shown, "minutes": _minutes(part).reindex(methods)}, methods)
    partial = partial_means(part)
    notes = [*notes_of_shares(shares), *notes_of_partial(partial), *notes_of_mixtures(part), *notes_of_minutes(part)]
    return Table(title, means, stds, about, _lost(part).reindex(methods), notes, frozenset(partial))


def _mean_of_all(values: pd.Series) -> float:
    """NaN if one of them is missing: DER of some of the records is not that of all."""
    return float(values.mean(skipna=False))


def _minutes(part: pd.DataFrame) -> pd.Series:
    """Elapsed minutes of a run of each method, as text: the mean of those that did all their work themselves."""
    seconds = pd.to_numeric(part["seconds"], errors="coerce").mask(part["reused"].notna())
    minutes = seconds.groupby(part["method"]).mean() / 60
    return minutes.map("{:.1f}".format).where(minutes.notna(), "-")


def _lost(part: pd.DataFrame) -> pd.DataFrame:
    """:attr:`Table.lost`."""
    lost = 100 * pd.to_numeric(part["acc_lost"], errors="coerce")
    return lost.groupby([part["method"], part["column"]]).agg(_mean_of_all).unstack()


def _attack_order(name: str) -> tuple[int, str]:
    """The attacks of papers in their order, all-to-all after each; then records and other attacks by name."""
    attack = name.removesuffix(ALL_TO_ALL)
    return [*ATTACK_TITLES, attack].index(attack), name


def _method_order(name: str) -> tuple[bool, bool, list[tuple[float, str]], str]:
    """The attacked model first, published rows last; fmp-p4 before fmp-p16, ft-lr0.05 before ft-lr0.1."""
    split = re.split(r"(\d+(?:\.\d+)?)", name)  # texts and numbers in turn
    parts = [(float(part), "") if place % 2 else (-1.0, part) for place, part in enumerate(split)]
    return not name.startswith(BASELINE), name.endswith(PUBLISHED), parts, name


def to_text(table: Table, width: int = 128) -> str:
    """For a terminal: as many attacks side by side as fit ``width``; the best of a column has a star."""
    texts = table.texts() + table.best().map({True: "*", False: " "}.get)
    texts.index = texts.index.map(printable)

    def render(attacks: Sequence[str]) -> str:
        about = ABOUT if attacks[0] == table.attacks[0] else ["ratio"]  # minutes once: narrow terminals have little room
        block = texts[[*(("", name) for name in about), *((attack, metric) for attack in attacks for metric in HEADLINES)]]
        heads = [(attack_title(a) if m in (*about, "test_acc") else "", f"{HEADLINES.get(m, m)} ") for a, m in block.columns]
        lines = block.set_axis(pd.MultiIndex.from_tuples(heads), axis=1).to_string().splitlines()
        return "\n".join(line.rstrip() for line in lines)

    blocks: list[list[str]] = []
    for attack in table.attacks:
        wider = [*blocks[-1], attack] if blocks else []
        if wider and max(map(len, render(wider).splitlines())) <= width:
            blocks[-1] = wider
        else:
            blocks.append([attack])
    notes = "".join(f"{printable(note)}\n" for note in table.notes)
    return f"{printable(table.title)} (percent; * best)\n" + "\n\n".join(map(render, blocks)) + f"\n{notes}"


def to_markdown(table: Table) -> str:
    """One wide table; the best of a column is bold. Names are escaped: they come from records."""

    def plain(text: object) -> str:
        return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", printable(text))

    cells = table.texts()
    cells = cells.where(~table.best(), "**" + cells + "**")
    heads = [f"{plain(attack_title(column[0]))} {HEADLINES[column[1]]}" for column in table.means.columns]
    notes = [f"\n{plain(note)}" for note in table.notes]
    rows = [["Method", *ABOUT, *heads], ["---", *("---:" for _ in [*ABOUT, *heads])]]
    rows += [[plain(method), *texts] for method, texts in zip(cells.index, cells.to_numpy().tolist(), strict=True)]
    lines = [f"**{plain(table.title)}** (percent)", "", *(f"| {' | '.join(row)} |" for row in rows), *notes]
    return "\n".join(lines) + "\n"


def to_latex(table: Table) -> str:
    """A booktabs table (``\\usepackage{booktabs}``), the best in bold, mean ± std over seeds."""

    def head(metric: str) -> str:
        arrow = r" $\downarrow$" if metric in LOW_IS_GOOD else r" $\uparrow$"
        return HEADLINES[metric] + arrow if metric in HEADLINES else metric

    texts, bold = table.texts(r"\,$\pm$\,"), table.best().map({True: "textbf:--rwrap;", False: ""}.get)
    texts.columns.names = [None, "Method"]
    styler = texts.style.apply(lambda _: bold, axis=None)
    styler.format_index(printable, axis=0, escape="latex").format_index(head, axis=1, level=1)
    styler.format_index(lambda name: _latex(attack_title(name)), axis=1, level=0)  # pandas would escape the name, not the title
    caption = " ".join(
        ["Acc, ASR, RA, DER and RIR in percent.", f"{_latex(printable(table.title))}.", *map(_latex, table.notes)]
    )
    columns = "l" + "r" * len(texts.columns)
    return styler.to_latex(hrules=True, position_float="centering", multicol_align="c", column_format=columns, caption=caption)


def _latex(text: str) -> str:
    """``text`` with LaTeX's special characters escaped."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(char, rf"\{char}" if char in "&%$#_{}" else char) for char in text)


def to_html(tables: Sequence[Table]) -> str:
    """A whole page without outside references; every name in it is escaped."""
    loader = jinja2.FileSystemLoader(ASSETS)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["printable"] = printable
    grids = [_grid(table, number) for number, table in enumerate(tables)]
    return environment.get_template("tables.html").render(tables=tables, grids=grids, group=len(HEADLINES))


def _grid(table: Table, number: int) -> str:
    texts = table.texts()
    texts.columns.names = [None, "Method"]
    styler = texts.style.set_uuid(f"t{number}").apply(lambda _: _css(table), axis=None)
    styler.apply_index(lambda names: [ITALIC if name.endswith(PUBLISHED) else "" for name in names])
    styler.format_index(printable, axis=0, escape="html").format_index(attack_title, axis=1, level=0, escape="html")
    styler.format_index(lambda metric: HEADLINES.get(str(metric), str(metric)), axis=1, level=1)
    return str(styler.to_html())


def _css(table: Table) -> pd.DataFrame:
    """The style of each cell: its bar, bold where it is best, italic where it is published."""
    css = table.best().map({True: "font-weight: 700;", False: ""}.get)
    for column in table.means.columns:
        colour, means = f"var(--{'bad' if column[1] in LOW_IS_GOOD else 'good'})", table.means[column]
        bars = means.map(f"background: linear-gradient(90deg, {colour} {{:.1f}}%, transparent 0);".format)
        css[column] += bars.where(means.notna(), "")
    css[css.index.str.endswith(PUBLISHED)] += ITALIC
    return css
