"""The experiments of the FMP paper: what each table needs, at which scale, and our figures beside the published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from fmp_core.metrics import METRICS
from fmp_core.results.tables import ATTACK_TITLES, AVERAGE, SHOWN
from fmp_core.settings import PROJECT
from fmp_core.storage.files import replacing

PUBLISHED = PROJECT / "record_scripts" / "published"
TABLES = ("1a", "1b", "1c", "2", "3", "4", "5", "6", "7")
FIGURES = {"1": "2", "2": "3", "3": "4", "4": "5"}  # appendix B draws Tables 2 to 5
NOT_RUNNABLE = {"aeva", "deepinspect", "tabor", "abs", "fu2020"}  # no implementation in BackdoorBench or here
# What a table varies (a published column), and FMP's value of it everywhere else.
VARIED = {"2": "pratio", "3": "ratio", "4": "eps", "5": "p"}
USUAL = {"ratio": "0.1", "eps": "1/255", "p": "64"}
# Flags of BackdoorBench's defenses as the paper's "Defense setup" gives them; the rest is BackdoorBench's default.
RETRAINING = {"epochs": 10, "batch_size": 256, "lr": 0.01, "ratio": 0.1}
BASELINES: dict[str, dict[str, Any]] = {
    "ft": RETRAINING,
    "fp": RETRAINING,
    "clp": {"u": 3},
    "anp": {"ratio": 0.1, "anp_eps": 0.4},
    "nc": RETRAINING,
    "nad": {**RETRAINING, "te_epochs": 10},
    "rnp": {"ratio": 0.1},
}


@dataclass(frozen=True)
class Scale:
    """How much of an experiment is run: ``attacks`` and ``values`` keep the first so many; the rest replaces the paper's."""

    name: str
    says: str
    attacks: int = 5
    values: int = 6
    dataset: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    ours: Mapping[str, Any] = field(default_factory=dict)
    baseline_epochs: int | None = None


_PAPER = {"model": "preactresnet18", "epochs": 100, "batch_size": 128, "lr": 0.01}
SCALES = {
    scale.name: scale
    for scale in (
        Scale("full", "the paper's: its datasets, PreActResNet18, 100 epochs of training (GTSRB 50)", record=_PAPER),
        Scale(
            "small",
            "small: 2 attacks, 3 values, 10 epochs of training instead of 100 (50), 3 of repair instead of 10",
            attacks=2,
            values=3,
            record={**_PAPER, "epochs": 10},
            ours={"epochs": 3, "frg_samples": 8, "frequency_test": 0},
            baseline_epochs=3,
        ),
        Scale(
            "demo",
            "demo: scikit-learn's digits and resnet18 instead of the paper's, 1 attack, 3 values, 3 epochs of repair",
            attacks=1,
            values=3,
            dataset="digits",
            record={"model": "resnet18", "epochs": 6},
            ours={"epochs": 3, "frg_samples": 4, "batch_size": 16, "frequency_test": 0},
            baseline_epochs=3,
        ),
    )
}


def published(table: str) -> pd.DataFrame:
    """The rows of a table as the paper prints them, fractions; settings as text."""
    return pd.read_csv(PUBLISHED / f"table_{table}.csv", dtype={"table": str, "ratio": str, "p": str, "eps": str})


def notes(table: str) -> list[str]:
    """What is known to be wrong with a published table."""
    frame = pd.read_csv(PUBLISHED / "notes.csv", dtype=str)
    return [note for tables, note in frame.itertuples(index=False) if table in tables.split()]


def scaled_rows(table: str, scale: Scale) -> pd.DataFrame:
    """The published rows within the width of ``scale``; ``value`` is what the table varies, or the defense."""
    rows = published(table)
    rows = rows[rows["attack"] != AVERAGE]
    column = VARIED.get(table, "defense")
    rows = rows[rows["attack"].isin(list(dict.fromkeys(rows["attack"]))[: scale.attacks])]
    if column != "defense":
        rows = rows[rows[column].isin(_spread(list(dict.fromkeys(rows[column])), scale.values))]
    return rows.assign(value=rows[column].astype(str)).reset_index(drop=True)


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """``count`` of ``values``, evenly spread, both ends kept."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def record_name(row: Any, scale: Scale) -> str:
    """``badnet_cifar10`` at full scale and 10 % poison; else with what differs."""
    name = f"{row.attack}_{scale.dataset or row.dataset}"
    name += "" if row.pratio == 0.1 else f"_{row.pratio:g}"
    return name if scale.name == "full" else f"{name}_{scale.name}"


def defense_folder(row: Any) -> str:
    """The result folder of a published row's defense: what differs from the paper's defaults is in the name."""
    if row.defense != "fmp":
        return str(row.defense)
    changed = {key: getattr(row, key) for key, usual in USUAL.items() if getattr(row, key) != usual}
    return "fmp" + "".join(f"-{key}{value.replace('/', '_')}" for key, value in changed.items())


def sweep_content(tables: Sequence[str], scale: Scale, backdoorbench: str | None, existing: Sequence[str]) -> dict[str, Any]:
    """The sweep that makes what ``tables`` need: content of a sweep file.

    Without ``backdoorbench`` only FMP and fine-tuning (as our ft-only) are run. Records in ``existing`` are taken as they are.
    """
    records: dict[str, Any] = {}
    defenses: dict[str, Any] = {}
    for table in tables:
        for row in scaled_rows(table, scale).itertuples():
            name = record_name(row, scale)
            flags: dict[str, Any] = {} if row.attack == "badnet" else {"attack": row.attack}  # make_record's default
            flags |= {"dataset": scale.dataset or row.dataset, "pratio": float(str(row.pratio)), **scale.record}
            if scale.name == "full" and row.dataset == "gtsrb":
                flags["epochs"] = 50
            records[name] = name if name in existing else {"name": name, **flags}
            entry = _defense_entry(row, scale, backdoorbench)
            if entry:
                defenses[defense_folder(row)] = entry
    return {
        "name": f"paper-{'-'.join(tables)}-{scale.name}",
        "records": list(records.values()),
        "defenses": list(defenses.values()),
        "ours": dict(scale.ours),
        "backdoorbench": backdoorbench,
    }


def _defense_entry(row: Any, scale: Scale, backdoorbench: str | None) -> dict[str, Any] | None:
    if row.defense == "fmp":
        return {"defense": "fmp", "name": defense_folder(row), **{key: getattr(row, key) for key in USUAL}}
    if row.defense == "ft" and backdoorbench is None:
        return {"defense": "ft-only", "name": "ft"}
    if row.defense not in BASELINES or backdoorbench is None:
        return None
    flags = BASELINES[row.defense]
    if scale.baseline_epochs:
        flags = {key: scale.baseline_epochs if key.endswith("epochs") else value for key, value in flags.items()}
    return {"defense": row.defense, **flags}


def compare(table: str, scale: Scale, frame: pd.DataFrame) -> pd.DataFrame:
    """One row per attack and value, and AVG rows over the attacks shown.

    ``ours_*``, ``published_*`` and ``difference_*`` are percent; ours is the mean over seeds, empty for what was not run.
    """
    rows = []
    for row in scaled_rows(table, scale).itertuples():
        found = frame[(frame["record"] == record_name(row, scale)) & (frame["method"] == defense_folder(row))]
        line: dict[str, Any] = {"attack": row.attack, "value": row.value, "defense": row.defense}
        for metric in METRICS:
            line[f"ours_{metric}"] = 100 * found[metric].mean() if len(found) else None
            line[f"published_{metric}"] = 100 * getattr(row, metric)
        rows.append(line)
    result = pd.DataFrame(rows)
    if result["attack"].nunique() > 1:
        figures = [f"{who}_{metric}" for who in ("ours", "published") for metric in METRICS]
        result[figures] = result[figures].astype(float)
        average = result.groupby(["value", "defense"], sort=False)[figures].agg(lambda x: x.mean(skipna=False)).reset_index()
        result = pd.concat([result, average.assign(attack=AVERAGE)], ignore_index=True)
    for metric in METRICS:
        ours = pd.to_numeric(result[f"ours_{metric}"])
        result[f"difference_{metric}"] = ours - result[f"published_{metric}"]
    return result


def comparison_text(table: str, scale: Scale, compared: pd.DataFrame, markdown: bool = False) -> str:
    """Ours | published | difference, with the scale, what was not run, and the paper's known contradictions."""
    heads = ["attack", VARIED.get(table, "method")]
    heads += [f"{SHOWN[metric]} {who}" for metric in METRICS for who in ("ours", "publ.", "diff.")]
    lines = []
    for row in compared.to_dict("records"):
        value = f"{100 * float(row['value']):g} %" if heads[1] in ("pratio", "ratio") else row["value"]
        if row["defense"] in NOT_RUNNABLE:
            value += " (published only)"
        cells = [_percent(row[f"{who}_{metric}"], who) for metric in METRICS for who in ("ours", "published", "difference")]
        lines.append([ATTACK_TITLES.get(row["attack"], row["attack"]), value, *cells])
    says = [f"Table {table}. Ours was run at this scale: {scale.says}. Published: FMP paper, ICLR 2024. Percent."]
    if scale.name != "full":
        says.append("At this scale the difference shows whether the trend holds, not whether the figures agree.")
    missing = sorted(set(compared[compared["ours_test_acc"].isna()]["defense"]) - NOT_RUNNABLE)
    if missing:
        says.append(f"Not run here: {', '.join(missing)} (BackdoorBench's need --backdoorbench).")
    says += [f"Note: {note}" for note in notes(table)]
    if markdown:
        table_lines = [heads, ["---", "---", *("---:" for _ in heads[2:])], *lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in table_lines) + "\n\n" + "\n\n".join(says) + "\n"
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    text = ["  ".join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(line)) for line in [heads, *lines]]
    return "\n".join([*text, "", *says]) + "\n"


def _percent(value: Any, who: str) -> str:
    return "-" if value is None or value != value else f"{value:+.2f}" if who == "difference" else f"{value:.2f}"


def draw_figure(path: Path, number: str, scale: Scale, compared: pd.DataFrame) -> None:
    """Figure 1 to 4: Acc, ASR and RA over what the table varies, one panel per attack; ours solid, published dashed."""
    table = FIGURES[number]
    attacks = [name for name in dict.fromkeys(compared["attack"]) if name != AVERAGE]
    figure = Figure(figsize=(4.2 * len(attacks), 4.2), dpi=120, layout="constrained")
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for panel, axes in enumerate(figure.subplots(1, len(attacks), squeeze=False, sharey=True)[0]):
        part = compared[compared["attack"] == attacks[panel]]
        ticks = range(len(part))
        for colour, metric in zip(colours, METRICS, strict=False):
            ours = pd.to_numeric(part[f"ours_{metric}"])
            axes.plot(ticks, ours, "o-", color=colour, label=f"{SHOWN[metric]} ours")
            axes.plot(ticks, part[f"published_{metric}"], "x--", color=colour, label=f"{SHOWN[metric]} published")
        axes.set_xticks(ticks, list(part["value"]))
        axes.set(title=ATTACK_TITLES[attacks[panel]], xlabel=VARIED[table], ylim=(-3, 103))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("percent")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(f"Figure {number}. Ours at scale {scale.name}", fontsize="medium")
    with replacing(path) as temporary:
        figure.savefig(temporary)
