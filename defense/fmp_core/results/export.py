"""All results below a record root, written in every format that is asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

from fmp_core.errors import UserError
from fmp_core.results.collect import collect, join_leaderboard, read_leaderboard
from fmp_core.results.figure import FORMATS, write_figure
from fmp_core.results.roc import detection_table, detections, write_roc
from fmp_core.results.tables import build_tables, to_html, to_latex, to_markdown, to_text
from fmp_core.results.titles import printable
from fmp_core.storage.files import check_distinct, replacing


def export(root: str, files: Mapping[str, Path], leaderboard: Path | None, width: int, warn: Callable[[str], None]) -> str:
    """The tables of all results below ``root`` as text of at most ``width`` columns.

    ``files`` says where to write ``csv`` and ``parquet`` (one row per result, fractions), ``markdown``, ``latex`` and ``html``
    (tables, percent), the ``figure``, and the ``roc`` of the detectors, whose table then comes last; matching rows of the
    ``leaderboard`` of BackdoorBench are shown as published.
    """
    for kind in ("figure", "roc"):
        if kind in files and files[kind].suffix not in FORMATS:
            raise UserError(f"--{kind} {files[kind]} must end in {', '.join(FORMATS)}, which says what to write.")
    check_distinct(files)
    if "parquet" in files and not importlib.util.find_spec("pyarrow"):
        raise UserError("--parquet needs pyarrow; run: pip install pyarrow")
    frame = collect(root, lambda text: warn(printable(text)))
    if frame.empty:
        raise UserError(f"There are no defense results below {root}; run a defense first.")
    found = detections(frame)
    if leaderboard:
        ours, frame = frame, join_leaderboard(frame, read_leaderboard(leaderboard))
        if frame is ours:
            warn("no leaderboard row has the dataset, model, attack and poison rate of a record here")
    tables = build_tables(frame)
    writers: dict[str, Callable[[Path], object]] = {  # those that may find nothing to draw come first, before a file is written
        "figure": lambda path: write_figure(path, tables),
        "roc": lambda path: write_roc(path, found),
        "csv": lambda path: frame.to_csv(path, index=False),
        "parquet": frame.to_parquet,
        "markdown": lambda path: path.write_text("\n".join(map(to_markdown, tables)), "utf-8"),
        "latex": lambda path: path.write_text("\n".join(map(to_latex, tables)), "utf-8"),
        "html": lambda path: path.write_text(to_html(tables), "utf-8"),
    }
    for kind, write in writers.items():
        if kind in files:
            with replacing(files[kind]) as temporary:
                write(temporary)
    return "\n".join([*(to_text(table, width) for table in tables), *([detection_table(found)] if "roc" in files else [])])
