"""What other defenses left beside a record, for a table in the report."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from .errors import UserError

METRICS = ["test_acc", "test_asr", "test_ra"]
# Summaries of a stage before the last one (nad's teacher).
EARLIER_STAGES = ("nad_te_df_summary.csv", "prune_log_summary.csv")


def read_defense(folder: Path) -> dict[str, float]:
    """Acc, ASR and RA (fractions) that a defense, ours or BackdoorBench's, wrote last into ``folder``.

    Raises:
        UserError: there is no summary, or it lacks a metric; names the folder.
    """
    if not folder.is_dir():
        raise UserError(f"--compare {folder.name}: {folder} does not exist; run that defense first.")
    found = [path for place in (folder, folder / "log") for path in sorted(place.glob("*_df_summary.csv"))]
    final = [path for path in found if path.name not in EARLIER_STAGES]
    if not final:
        raise UserError(f"--compare {folder.name}: {folder} holds no *_df_summary.csv; that defense may not have ended.")
    path = final[0]
    try:
        table = pd.read_csv(path, index_col=0)
        row = table.loc["last"] if "last" in table.index else table.iloc[-1]
        values = {name: float(row[name]) for name in METRICS}
    except (OSError, KeyError, IndexError, ValueError, TypeError) as error:
        raise UserError(f"--compare {folder.name}: {path} has no Acc, ASR and RA ({type(error).__name__}: {error}).") from None
    if path.name == "npd_df_summary.csv":  # the one defense that writes percent
        values = {name: value / 100 for name, value in values.items()}
    if not all(0 <= value <= 1 for value in values.values()):
        raise UserError(f"--compare {folder.name}: {path} has a metric that is no fraction of 1.")
    return values
