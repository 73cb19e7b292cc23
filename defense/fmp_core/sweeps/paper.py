"""Making the paper's tables and figures: a sweep over what is missing, then our results beside the published ones."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmp_core.data.names import ATTACK_FILE
from fmp_core.fields import as_text, parse_mapping, read_yaml_mapping
from fmp_core.results.paper import BASELINES, FIGURES, SCALES, Scale, baseline_flags, record_name, scaled_rows, sweep_content
from fmp_core.results.read import WHOLE_RUN, read_result, read_stamp
from fmp_core.storage.files import check_distinct, replacing, write_text
from fmp_core.sweeps.jobs import made_otherwise
from fmp_core.sweeps.plan import Slurm, make_sweep, plan
from fmp_core.sweeps.run import run_sweep

if TYPE_CHECKING:
    from pandas import DataFrame

SWEEP_KEYS = ("record_root", "dataset_path", "device", "workers", "seeds", "backdoorbench")  # flags that are keys of a sweep

WEAK = 0.5  # ASR of an attack below which a low ASR after a defense shows nothing


def make(args: Namespace, warn: Callable[[str], None]) -> int:
    """Run what is missing, then print and write what there is; returns the exit code of the sweep.

    ``args`` are the flags of ``record_scripts/paper_tables.py``; ``warn`` gets one line for each result that cannot be read.
    """
    check_distinct({kind: Path(path) for kind in ("csv", "markdown") if (path := getattr(args, kind))})
    tables, code = list(dict.fromkeys([*args.table, *(FIGURES[number] for number in args.figure)])), 0
    slurm = parse_mapping(Slurm, read_yaml_mapping(args.slurm, "Slurm file"), f"Slurm file {args.slurm}") if args.slurm else {}
    if not args.no_run:
        records = [path.parent for path in Path(args.record_root).glob(f"*/{ATTACK_FILE}")]
        by_hand = [folder.name for folder in records if not read_stamp(folder)]
        for table in tables:  # not one sweep: it would run the defenses of each table on the records of all
            content = sweep_content(table, SCALES[args.scale], args.backdoorbench, by_hand)
            content |= {key: getattr(args, key) for key in SWEEP_KEYS} | {"slurm": slurm}
            code = max(code, run_sweep(make_sweep(content, "paper_tables"), args.launcher, args.dry_run))
    if not args.dry_run:
        _show(tables, args, warn)
    return code


def of_other_settings(table: str, scale: Scale, frame: DataFrame, record_root: Path) -> dict[Any, str]:
    """Results in ``frame`` under the names of a table's rows, made with other settings than it has, or on a record that was:
    index -> a sentence."""
    content = sweep_content(table, scale, None, []) | {"record_root": str(record_root)}
    ours = plan(make_sweep(content, "paper_tables"))
    other_records = {job.record for job in ours if job.kind == "record" and made_otherwise(job)}
    wanted: dict[tuple[str, str, str], Mapping[str, Any]]
    wanted = {("ours", job.record, job.method): job.settings for job in ours if job.kind == "ours"}
    for row in scaled_rows(table, scale).itertuples():
        if (defense := str(row.defense)) in BASELINES:
            wanted["backdoorbench", record_name(row, scale), defense] = baseline_flags(defense, scale) | WHOLE_RUN
    found = {}
    for index, origin, record, method, defense in frame[["origin", "record", "method", "defense"]].itertuples(name=None):
        settings = wanted.get((origin, record, method), {})
        used = read_result(record_root / record / "defense" / defense).settings if settings else {}
        both = [(key, as_text(used[key]), as_text(value)) for key, value in settings.items() if key in used]
        differ = [
            f"{key} {own} instead of {value}" for key, own, value in both if key != "random_seed" and not _equal(own, value)
        ]
        if record in other_records:
            found[index] = f"{record}/defense/{defense} is left out: a sweep made the record with other settings"
        elif differ:
            found[index] = f"{record}/defense/{defense} is left out: {', '.join(differ)}"
    return found


def _equal(text: str, other: str) -> bool:
    """Whether two values, as text, are the same; BackdoorBench prints 3 as 3.0 where it takes any number."""
    try:
        return text == other or float(text) == float(other)
    except ValueError:
        return False


def _show(tables: list[str], args: Namespace, warn: Callable[[str], None]) -> None:
    import pandas as pd  # takes a second, which --help and --dry_run do without

    from fmp_core.results.collect import BASELINE, collect
    from fmp_core.results.paper_comparison import compare, comparison_text, draw_figure
    from fmp_core.results.titles import printable

    scale = SCALES[args.scale]
    frame = collect(args.record_root, lambda line: warn(printable(line)))
    frame = frame[frame["seed"].isna() | frame["seed"].isin(args.seeds)]
    compared = {}
    for table in tables:
        other = of_other_settings(table, scale, frame, Path(args.record_root))
        for line in other.values():
            warn(printable(f"table {table}: {line}"))
        records = {record_name(row, scale) for row in scaled_rows(table, scale).itertuples()}
        for record in sorted(records & set(frame["record"])):
            if not read_stamp(Path(args.record_root) / record):
                warn(printable(f"table {table}: {record} was not made by a sweep, so its training may not be the scale's"))
            attacked = frame[(frame["record"] == record) & (frame["defense"] == BASELINE)]["test_asr"]
            if len(attacked) and attacked.iloc[0] < WEAK:
                weak = f"the attack on {record} has ASR {100 * attacked.iloc[0]:.1f} % before any defense"
                warn(printable(f"table {table}: {weak}: there is no backdoor to remove"))
        compared[table] = compare(table, scale, frame.drop(list(other)))
    text, markdown = (
        [comparison_text(table, scale, part, kind, bool(args.backdoorbench)) for table, part in compared.items()]
        for kind in (False, True)
    )
    print(*text, sep="\n")
    if args.csv:
        with replacing(args.csv) as temporary:
            parts = [part.assign(table=table, scale=scale.name) for table, part in compared.items()]
            pd.concat(parts).to_csv(temporary, index=False)
    if args.markdown:
        write_text(args.markdown, "\n".join(markdown))
    for number in args.figure:
        path = Path(args.output) / f"figure_{number}_{scale.name}.png"
        draw_figure(path, number, scale, compared[FIGURES[number]])
        print(f"figure {number}: {path}")
