"""The tables and figures of the FMP paper with our results beside the published ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from fmp_core.metrics import HEADLINES, METRICS
from fmp_core.results import paper
from fmp_core.results.paper import FIGURES, NOT_RUNNABLE, VARIED, Scale
from fmp_core.results.plot_style import PLAIN
from fmp_core.results.titles import ATTACK_TITLES, AVERAGE
from fmp_core.storage.files import replacing

BB_ONLY = set(paper.BASELINES) - {"ft"}  # fine-tuning alone is one of ours, too


def compare(table: str, scale: Scale, frame: pd.DataFrame) -> pd.DataFrame:
    """One row per attack and value, and AVG rows over the attacks shown.

    ``ours_*``, ``published_*`` and ``difference_*`` are percent; ours is the mean over seeds, empty for what was not run.
    ``origin`` says who ran it: ``ours`` or ``backdoorbench``; ``own_attack``, which attack it is of; ``runs``, how many seeds.
    An average is empty, too, where BackdoorBench ran it on some attacks and we on others. Left out are results on a sample of
    the test images, and those of records with another model, attack or poison rate than the row's. ``fmp_core.sweeps.paper``
    has left out those of other settings.
    """
    frame = frame[frame["test_images"].isna() & (frame["model"].isna() | (frame["model"] == scale.record["model"]))]
    rows = []
    for row in paper.scaled_rows(table, scale).itertuples():
        results = _results_of(frame, row, scale)
        line: dict[str, Any] = {"attack": row.attack, "value": row.value, "defense": row.defense}
        line["origin"] = ", ".join(sorted(set(results["origin"])))
        line["runs"] = len(results)
        line["own_attack"] = ", ".join(sorted(set(results["attack"].dropna()))) or row.attack
        for metric in METRICS:
            line[f"ours_{metric}"] = 100 * float(results[metric].mean())
            line[f"published_{metric}"] = 100 * getattr(row, metric)
        rows.append(line)
    result = pd.DataFrame(rows)
    if result["attack"].nunique() > 1:
        figures = [f"{who}_{metric}" for who in ("ours", "published") for metric in METRICS]
        groups = result.groupby(["value", "defense"], sort=False)
        average = groups[figures].agg(lambda x: x.mean(skipna=False)).reset_index()
        mixed = groups["origin"].nunique().gt(1).to_numpy()
        average.loc[mixed, [f"ours_{metric}" for metric in METRICS]] = float("nan")
        result = pd.concat([result, average.assign(attack=AVERAGE)], ignore_index=True)
    for metric in METRICS:
        result[f"difference_{metric}"] = result[f"ours_{metric}"] - result[f"published_{metric}"]
    return result


def _results_of(frame: pd.DataFrame, row: Any, scale: Scale) -> pd.DataFrame:
    """Our results for a published row. BackdoorBench's ft comes before ours, and our SSBA-like attack may stand for SSBA."""
    attacks = {row.attack, "ssba_like"} if row.attack == "ssba" else {row.attack}
    meant = (frame["record"] == paper.record_name(row, scale)) & frame["target"].ne("all-to-all").fillna(True)
    meant &= frame["attack"].isna() | frame["attack"].isin(attacks)
    meant &= frame["pratio"].isna() | frame["pratio"].isin([row.pratio])
    results = frame[meant & (frame["method"] == paper.defense_folder(row))]
    return frame[meant & (frame["method"] == "ft-only")] if row.defense == "ft" and results.empty else results


def comparison_text(
    table: str, scale: Scale, compared: pd.DataFrame, markdown: bool = False, backdoorbench: bool = False
) -> str:
    """Ours | published | difference, with the scale, what was not run, and the paper's known contradictions.

    ``backdoorbench`` says that its defenses were asked for, so that those without a result have failed.
    """
    heads = ["attack", VARIED.get(table, "method")]
    heads += [f"{HEADLINES[metric]} {who}" for metric in METRICS for who in ("ours", "publ.", "diff.")]
    lines = []
    for row in compared.to_dict("records"):
        value = f"{100 * float(row['value']):g} %" if heads[1] in ("pratio", "ratio") else row["value"]
        if row["defense"] in NOT_RUNNABLE:
            value += " (published only)"
        figures = [(who, row[f"{who}_{metric}"]) for metric in METRICS for who in ("ours", "published", "difference")]
        cells = ["-" if pd.isna(x) else f"{x:+.2f}" if who == "difference" else f"{x:.2f}" for who, x in figures]
        lines.append([ATTACK_TITLES.get(row["attack"], row["attack"]), value, *cells])
    says = [f"Table {table}. Ours was run at this scale: {scale.says}. Published: FMP paper, ICLR 2024. Percent."]
    if scale.name != "full":
        says.append("At this scale the difference shows whether the trend holds, not whether the figures agree.")
    says += _not_run(table, compared, backdoorbench)
    says += [f"Note: {note}" for note in paper.notes(table)]
    if markdown:
        table_lines = [heads, ["---", "---", *("---:" for _ in heads[2:])], *lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in table_lines) + "\n\n" + "\n\n".join(says) + "\n"
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    text = ["  ".join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(line)) for line in [heads, *lines]]
    return "\n".join([*text, "", *says]) + "\n"


def _not_run(table: str, compared: pd.DataFrame, backdoorbench: bool) -> Iterator[str]:
    """Sentences on the rows without a figure of ours, and on rows that are not what the paper ran."""
    own = compared[(compared["attack"] != AVERAGE) & ~compared["defense"].isin(NOT_RUNNABLE)]
    left_out: list[str] = []
    missing: list[str] = []
    for (defense, value), rows in own.groupby(["defense", "value"], sort=False):
        absent = rows.loc[rows["ours_test_acc"].isna(), "attack"]
        name = "the attacked model" if defense == "no defense" else defense
        name += f" at {VARIED[table]} {value}" if table in VARIED else ""
        name += f" ({', '.join(ATTACK_TITLES[attack] for attack in absent)})" if len(absent) < len(rows) else ""
        if len(absent):
            (left_out if defense in BB_ONLY and not backdoorbench else missing).append(name)
    if left_out:
        yield f"Not run: {', '.join(left_out)}, which are BackdoorBench's; --backdoorbench runs them."
    if missing:
        yield f"Without a result: {', '.join(missing)}; not run yet, or failed."
    tuned = own[own["defense"] == "ft"]
    if (of_ours := tuned["origin"] == "ours").any():
        places = "" if of_ours.all() else f" of {', '.join(ATTACK_TITLES[attack] for attack in tuned.loc[of_ours, 'attack'])}"
        yield f"The row ft{places} is this project's ft-only (fine-tuning without pruning), not BackdoorBench's."
    for (defense, _), rows in own[own["runs"] > 0].groupby(["defense", "value"], sort=False):
        if rows["runs"].nunique() > 1:
            seeds = ", ".join(f"{ATTACK_TITLES[row.attack]} {row.runs:.0f}" for row in rows.itertuples())
            yield f"Means over different numbers of seeds: {defense} ({seeds})."
    if "ssba_like" in set(own["own_attack"]):
        yield "SSBA is this project's SSBA-like attack here, not SSBA's trained encoder (docs/records.md)."


@PLAIN
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
            axes.plot(ticks, part[f"ours_{metric}"], "o-", color=colour, label=f"{HEADLINES[metric]} ours")
            axes.plot(ticks, part[f"published_{metric}"], "x--", color=colour, label=f"{HEADLINES[metric]} published")
        axes.set_xticks(ticks, list(part["value"]))
        axes.set(title=ATTACK_TITLES[attacks[panel]], xlabel=VARIED[table], ylim=(-3, 103))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("percent")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(f"Figure {number}. Ours at scale {scale.name}", fontsize="medium")
    with replacing(path) as temporary:
        figure.savefig(temporary)
