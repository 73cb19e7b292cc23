"""Runs of the ablations on a record, and their table; what has been run before with the same settings is not run again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from fmp_core.errors import UserError
from fmp_core.inputs import Inputs, load_inputs, paired_images
from fmp_core.metrics import HEADLINES, METRICS
from fmp_core.models.activation_change import precision_at, trigger_activation_change
from fmp_core.models.evaluate import to_unit
from fmp_core.results.run_folder import RunFolder
from fmp_core.results.summary import RunSummary
from fmp_core.selection.ablation import ROWS, ROWS_SET
from fmp_core.settings import load_settings
from fmp_core.storage.files import replacing
from fmp_core.system.devices import choose_device
from fmp_core.system.versions import versions


def activation_change(inputs: Inputs) -> Tensor:
    """TAC of the attacked model on pairs of clean and poisoned test images, float64 ``[N]``."""
    clean, poisoned, _ = paired_images(inputs.test)
    return trigger_activation_change(inputs.defender.model, inputs.defender.layers, to_unit(clean), to_unit(poisoned))


def ablate(inputs: Inputs, rows: Sequence[str], flags: dict[str, Any], make: Callable[..., Any]) -> pd.DataFrame:
    """One row each for the attacked model and every ablation, in percent; ``precision`` is against TAC.

    Args:
        inputs: of the record, as read with ``flags``.
        rows: keys of :data:`ROWS`.
        flags: settings of FMP, result_file among them.
        make: the class FMP: ``make(settings, select)``.

    Raises:
        UserError: a flag sets what the rows differ in.
    """
    given = next((name for name in ROWS_SET if name in flags), None)
    if given is not None:
        raise UserError(f"--{given} is set by each row of the ablation; leave it out.")
    tac = activation_change(inputs)
    table: list[dict[str, Any]] = []
    for row in rows:
        run = _run_of(row, tac, flags, make)
        folder = RunFolder.of(run.settings, inputs.record.folder).path
        metrics = _finished(folder, run, row, inputs) or run.defense(flags["result_file"])["metrics"]
        if not table:
            table.append({"row": "(attacked)", **_percent(metrics["before"])})
        mask = torch.tensor(pd.read_csv(folder / "feature_maps.csv")["pruned"].tolist())
        precision = round(precision_at(mask, tac, inputs.defender.layers).value, 2)
        table.append({"row": row, "maps": metrics["pruned"], **_percent(metrics["after"]), "precision": precision})
        print(as_text(pd.DataFrame(table)), flush=True)
    return pd.DataFrame(table)


def _run_of(row: str, tac: Tensor, flags: dict[str, Any], make: Callable[..., Any]) -> Any:
    ablation = ROWS[row]
    sampled = f"-{flags['test_images']}" if flags.get("test_images") else ""
    settings = {"report": False, **flags, **ablation.settings, "defense_name": f"ablate-{row}{sampled}"}
    if ablation.select is None:
        return make(settings)
    select = partial(ablation.select, tac)
    return make(settings, lambda *given: replace(select(*given), selected_by=_selected_by(row)))


def _selected_by(row: str) -> str:
    return f"ablate.py --rows {row}"


def _finished(folder: Path, run: Any, row: str, inputs: Inputs) -> dict[str, Any] | None:
    """The metrics of an earlier run on the same record with the same settings, clean subset and versions."""
    path = folder / "metrics.json"
    if run.settings.fresh or not path.is_file():
        return None
    try:
        metrics = RunSummary.read(path)
        same_subset = (folder / "index.txt").read_text().split() == [str(position) for position in inputs.subset]
    except (UserError, OSError):
        return None
    wanted = json.loads(json.dumps(vars(run.settings), default=str))
    now = (wanted, _selected_by(row) if ROWS[row].select else None, versions(), inputs.record.digest)
    then = (metrics.settings, metrics.chosen_by, metrics.versions, metrics.attack_result)
    return metrics.as_dict() if same_subset and now == then else None


def _percent(metrics: dict[str, float]) -> dict[str, float]:
    return {HEADLINES[name]: round(100 * metrics[name], 2) for name in METRICS}


def as_text(table: pd.DataFrame) -> str:
    """The table for a terminal; empty cells stay empty."""
    return table.to_string(index=False, na_rep="")


def ablate_records(
    records: Sequence[str], rows: Sequence[str] | None, flags: dict[str, Any], make: Callable[..., Any], csv: Path | None
) -> None:
    """Print the table of each record, and write all of them to ``csv`` if it is given; arguments as of :func:`ablate`.

    Raises:
        UserError: an unknown row, or as :func:`ablate`.
    """
    unknown = next((row for row in rows or () if row not in ROWS), None)
    if unknown is not None:
        raise UserError(f"--rows {unknown} is no row; there are {', '.join(ROWS)}.")
    tables = []
    for record in records:
        settings = load_settings({**flags, "result_file": record})
        inputs = load_inputs(settings, record, choose_device(settings.device).device)
        if not inputs.record.bd_test:
            raise UserError(f"{record}: what parts contribute is measured on triggered images, and the record holds none.")
        table = ablate(inputs, rows or list(ROWS), {**flags, "result_file": record}, make)
        table.insert(0, "record", record)
        tables.append(table)
    whole = pd.concat(tables)
    if csv:
        with replacing(csv) as temporary:
            whole.to_csv(temporary, index=False)
    print(f"\n{as_text(whole)}")
