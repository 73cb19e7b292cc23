"""The experiments of the FMP paper: what each table shows, at which scale, and the sweep that makes it.

:mod:`fmp_core.results.paper_comparison` puts our figures beside the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fmp_core import PROJECT
from fmp_core.data.names import BB_DATASETS
from fmp_core.errors import UserError
from fmp_core.fields import read_yaml_mapping
from fmp_core.results.titles import AVERAGE

if TYPE_CHECKING:
    from pandas import DataFrame  # takes a second to import, and --help needs none


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


PUBLISHED = PROJECT / "record_scripts" / "published"
TABLES = ("1a", "1b", "1c", "2", "3", "4", "5", "6", "7")
FIGURES = {"1": "2", "2": "3", "3": "4", "4": "5"}  # appendix B draws Tables 2 to 5
NOT_RUNNABLE = {"aeva", "deepinspect", "tabor", "abs", "fu2020"}  # no implementation in BackdoorBench or here
# What a table varies (a published column), and FMP's value of it everywhere else.
VARIED = {"2": "pratio", "3": "ratio", "4": "eps", "5": "p"}
USUAL = {"ratio": "0.1", "eps": "1/255", "p": "64"}
_EXPERIMENTS = read_yaml_mapping(PUBLISHED / "experiments.yaml", "The list of experiments")
BASELINES: dict[str, dict[str, Any]] = _EXPERIMENTS["baselines"]
SCALES = {name: Scale(name, **about) for name, about in _EXPERIMENTS["scales"].items()}


def published(table: str) -> DataFrame:
    """The rows of a table as the paper prints them, fractions; settings as text."""
    import pandas as pd

    return pd.read_csv(PUBLISHED / f"table_{table}.csv", dtype={"table": str, "ratio": str, "p": str, "eps": str})


def notes(table: str) -> list[str]:
    """What is known to be wrong with a published table."""
    import pandas as pd

    frame = pd.read_csv(PUBLISHED / "notes.csv", dtype=str)
    return [note for tables, note in frame.itertuples(index=False) if table in tables.split()]


def scaled_rows(table: str, scale: Scale) -> DataFrame:
    """The published rows within the width of ``scale``; ``value`` is what the table varies, or the defense."""
    rows, column = published(table), VARIED.get(table, "defense")
    rows = rows[rows["attack"] != AVERAGE]
    rows = rows[rows["attack"].isin(rows["attack"].unique()[: scale.attacks])]
    if column != "defense":
        rows = rows[rows[column].isin(_spread(rows[column].unique(), scale.values))]
    return rows.assign(value=rows[column].astype(str)).reset_index(drop=True)


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of ``values``, evenly spread, both ends kept."""
    count = min(count, len(values))
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def record_name(row: Any, scale: Scale) -> str:
    """``badnet_cifar10`` at full scale and 10 % poison; else with what differs."""
    name = f"{row.attack}_{scale.dataset or row.dataset}" + ("" if row.pratio == 0.1 else f"_{row.pratio:g}")
    return name if scale.name == "full" else f"{name}_{scale.name}"


def defense_folder(row: Any) -> str:
    """The result folder of a published row's defense: what differs from the paper's defaults is in the name."""
    if row.defense != "fmp":
        return str(row.defense)
    changed = {key: getattr(row, key) for key, usual in USUAL.items() if getattr(row, key) != usual}
    return "fmp" + "".join(f"-{key}{value.replace('/', '_')}" for key, value in changed.items())


def sweep_content(table: str, scale: Scale, backdoorbench: str | None, existing: Sequence[str]) -> dict[str, Any]:
    """The sweep that makes what a table needs: content of a sweep file.

    Without ``backdoorbench`` only FMP and fine-tuning (as our ft-only) are run. Records in ``existing`` are taken as they are.
    """
    if backdoorbench and scale.dataset not in (None, *BB_DATASETS):
        raise UserError(
            f"--scale {scale.name} uses {scale.dataset}, which BackdoorBench cannot read (it knows {', '.join(BB_DATASETS)}); "
            "leave --backdoorbench out, or choose another --scale."
        )
    records: dict[str, Any] = {}
    defenses: dict[str, Any] = {}
    for row in scaled_rows(table, scale).itertuples():
        name = record_name(row, scale)
        flags: dict[str, Any] = {} if row.attack == "badnet" else {"attack": row.attack}  # make_record's default
        flags |= {"dataset": scale.dataset or row.dataset, "pratio": row.pratio, **scale.record}
        if scale.name == "full" and row.dataset == "gtsrb":
            flags["epochs"] = 50
        records[name] = name if name in existing else {"name": name, **flags}
        if entry := _defense_entry(row, scale, backdoorbench):
            defenses[defense_folder(row)] = entry
    return {
        "name": f"paper-{table}-{scale.name}",
        "records": list(records.values()),
        "defenses": list(defenses.values()),
        "ours": dict(scale.ours),
        "backdoorbench": backdoorbench,
    }


def _defense_entry(row: Any, scale: Scale, backdoorbench: str | None) -> dict[str, Any] | None:
    if row.defense == "fmp":
        return {"defense": "fmp", "name": defense_folder(row), **{key: getattr(row, key) for key in USUAL}}
    if backdoorbench is None:
        return {"defense": "ft-only"} if row.defense == "ft" else None
    return {"defense": row.defense, **baseline_flags(row.defense, scale)} if row.defense in BASELINES else None


def baseline_flags(defense: str, scale: Scale) -> dict[str, Any]:
    """Flags of BackdoorBench's script for one of ``BASELINES``."""
    epochs = scale.baseline_epochs
    return {key: epochs if epochs and key.endswith("epochs") else value for key, value in BASELINES[defense].items()}
