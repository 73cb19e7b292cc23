"""Making the paper's tables and figures: a sweep over what is missing, then our results beside the published ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fmp_core.results.paper import FIGURES, SCALES, sweep_content
from fmp_core.storage.files import replacing, write_text
from fmp_core.sweeps.jobs import ATTACK_FILE, read_stamp
from fmp_core.sweeps.plan import make_sweep
from fmp_core.sweeps.run import run_sweep


def run_missing(tables: Sequence[str], scale: str, keys: Mapping[str, Any], launcher: str, dry_run: bool) -> int:
    """Run the sweep behind ``tables`` (at a scale of SCALES) and return its exit code.

    ``keys`` are further keys of the sweep file, ``record_root`` among them. Raises UserError: as a sweep does, or
    BackdoorBench's defenses are asked to run on what it cannot read.
    """
    records = [path.parent for path in Path(keys["record_root"]).glob(f"*/{ATTACK_FILE}")]
    by_hand = [folder.name for folder in records if not read_stamp(folder)]
    content = sweep_content(tables, SCALES[scale], keys["backdoorbench"], by_hand)
    return run_sweep(make_sweep({**content, **keys}, "paper_tables"), launcher, dry_run)


def show(
    tables: Sequence[str],
    figures: Mapping[str, Path],
    scale: str,
    record_root: str,
    backdoorbench: bool,
    files: Mapping[str, Path | None],
    warn: Callable[[str], None],
) -> None:
    """Print the comparison with what is below ``record_root``, and write ``figures`` (by number) and ``files``.

    Args:
        backdoorbench: its defenses were asked for, so those without a result have failed.
        files: where to write ``csv`` and ``markdown``; None: nowhere.
        warn: gets one line for each result that cannot be read.

    Raises:
        UserError: ``record_root`` is no folder, or a file cannot be written.
    """
    import pandas as pd  # takes a second, which --help and --dry-run do without

    from fmp_core.results.collect import collect
    from fmp_core.results.paper_comparison import compare, comparison_text, draw_figure
    from fmp_core.results.tables import printable

    frame = collect(record_root, lambda line: warn(printable(line)))
    compared = {table: compare(table, SCALES[scale], frame) for table in tables}
    text, markdown = (
        [comparison_text(table, SCALES[scale], part, kind, backdoorbench) for table, part in compared.items()]
        for kind in (False, True)
    )
    print(*text, sep="\n")
    if files["csv"]:
        with replacing(files["csv"]) as temporary:
            parts = [part.assign(table=table, scale=scale) for table, part in compared.items()]
            pd.concat(parts).to_csv(temporary, index=False)
    if files["markdown"]:
        write_text(files["markdown"], "\n".join(markdown))
    for number, path in figures.items():
        draw_figure(path, number, SCALES[scale], compared[FIGURES[number]])
        print(f"figure {number}: {path}")
