"""What a table of results must tell its reader: sentences on rows that are not to be compared with others."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from fmp_core.results.collect import BASELINE
from fmp_core.results.titles import attack_title

PUBLISHED = "(published)"
SAMPLE = " test images)"  # ends the name of a method that was tested on a sample


def partial_means(part: pd.DataFrame) -> dict[tuple[str, str], list[str]]:
    """Methods whose mean over an attack's records lacks some of them -> the records that are missing."""
    here = part[part["origin"] != "published"]
    method = here["method"]
    run = here[method.eq(BASELINE) | ~(method.str.startswith(BASELINE) | method.str.endswith(SAMPLE))]
    records = run.groupby("column")["record"].agg(set)
    owned = run.groupby(["column", "method"])["record"].agg(set)
    return {place: sorted(absent) for place, own in owned.items() if (absent := records[place[0]] - own)}


def notes_of_mixtures(part: pd.DataFrame) -> Iterator[str]:
    """On methods whose results are not alike: in settings, in origin, in the code that ran, or in how many there are."""
    run = part[part["origin"].isin(["ours", "backdoorbench"])]
    kinds = (
        ("settings_digest", "Settings differ between attacks, so AVG mixes them"),
        ("origin", "Results of this project and of BackdoorBench's script of that name are in one row"),
        ("code", "Results of different commits of this project are in one row"),
    )
    for column, says in kinds:
        several = run.groupby("method")[column].nunique() > 1
        if several.any():
            yield f"{says}: {', '.join(several.index[several])}."
    counts = run.groupby(["method", "column"])["record"].agg(lambda records: tuple(sorted(records.value_counts().unique())))
    uneven = [name for name, of in counts.groupby("method") if len(set(of)) > 1 or len(of.iloc[0]) > 1]
    for name in uneven:
        listed = ", ".join(f"{attack_title(attack)} {' or '.join(map(str, runs))}" for attack, runs in counts[name].items())
        yield f"Means over different numbers of seeds: {name} ({listed})."


def notes_of_minutes(part: pd.DataFrame) -> Iterator[str]:
    """On runs whose time is not that of the whole run, so not in the mean of their method."""
    reused = part["reused"].notna()
    if reused.any():
        counts = reused.groupby(part["method"]).agg(["sum", "size"]).query("sum > 0")
        listed = ", ".join(f"{method} {left} of {runs}" for method, left, runs in counts.itertuples())
        yield f"Minutes leave out runs that were continued, or read scores or a verdict from a cache: {listed}."


def notes_of_partial(partial: dict[tuple[str, str], list[str]]) -> Iterator[str]:
    """On what :func:`partial_means` found: (attack, method) -> records that are missing."""
    if partial:
        listed = "; ".join(
            f"{method} on {attack_title(column)} lacks {', '.join(absent)}" for (column, method), absent in partial.items()
        )
        yield f"Means over fewer records than others, so not to be compared with them: {listed}."


def notes_of_shares(shares: dict[str, list[float]]) -> Iterator[str]:
    """Sentences on the ``shares`` of clean data that each method had, and on methods tested on a sample."""
    distinct = sorted({share for owned in shares.values() for share in owned})
    by_share = {share: [method for method, owned in shares.items() if share in owned] for share in distinct}
    if len(by_share) > 1:
        listed = "; ".join(f"{share:g}: {', '.join(methods)}" for share, methods in by_share.items())
        yield f"The methods had different shares of clean data ({listed}); ratio: in a sweep file sets one for all."
    if sampled := [method for method in shares if method.endswith(SAMPLE)]:
        yield f"Tested on a sample of the test images, so not to be compared with the other rows: {', '.join(sampled)}."
