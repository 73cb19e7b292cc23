"""Ablations: FMP with another selection of feature maps, or without one of its parts, on the same clean subset.

The rows ``oracle...`` look at the poisoned test set on purpose, to show what a perfect ranking would do; they are no defense.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from fmp_core.errors import UserError
from fmp_core.inputs import DefenderInputs, Inputs, load_inputs, paired_images
from fmp_core.metrics import HEADLINES, METRICS
from fmp_core.models.activation_change import precision_at, trigger_activation_change
from fmp_core.models.evaluate import to_unit
from fmp_core.selection.choice import Selection, highest_in_each_layer, select_at_random, select_none
from fmp_core.selection.select import select_by_trigger, test_for_backdoor
from fmp_core.settings import Settings, load_settings
from fmp_core.storage.files import replacing
from fmp_core.system.cli import Stages
from fmp_core.system.devices import choose_device
from fmp_core.system.versions import versions

PAIRS = 512  # clean and poisoned images that the oracle compares
# A flag may not set these.
ROWS_SET = ("preset", "selection", "scope", "masked", "unlearn", "distill", "interpolate", "defense_name")


@dataclass(frozen=True)
class Ablation:
    """One row: ``settings`` over the user's; ``select`` replaces FMP's selection if it is given.

    ``select`` gets how far the real trigger changes the activation of each map (TAC, float64 ``[N]``) before the usual
    arguments of a selection; only the oracle may look at it.
    """

    settings: dict[str, Any]
    select: Callable[[Tensor, DefenderInputs, Settings, Path, Stages], Selection] | None = None


def _at_random(seed: int) -> Callable[..., Selection]:
    def select(_tac: Tensor, defender: DefenderInputs, settings: Settings, *_: Any) -> Selection:
        return select_at_random(defender.layers, settings.p, settings.scope, seed)

    return select


def _oracle(tac: Tensor, defender: DefenderInputs, settings: Settings, *_: Any) -> Selection:
    """The N/p maps of each layer whose activation the real trigger changes most."""
    return Selection(highest_in_each_layer(tac, defender.layers, settings.p))


def _strong_with(mask_of: Callable[[Selection, DefenderInputs, Settings], Tensor]) -> Callable[..., Selection]:
    """The selection of ``--preset strong``, verdict and triggers included, with another mask where it shows a backdoor."""

    def select(_tac: Tensor, defender: DefenderInputs, settings: Settings, cache: Path, stages: Stages) -> Selection:
        verdict = test_for_backdoor(defender, settings, cache, stages)
        if not verdict.backdoored:
            return replace(select_none(defender.layers), verdict=verdict)
        selection = select_by_trigger(defender, settings, verdict, stages)
        return replace(selection, mask=mask_of(selection, defender, settings))

    return select


def _highest_change(selection: Selection, defender: DefenderInputs, settings: Settings) -> Tensor:
    assert selection.activation_change is not None
    return highest_in_each_layer(selection.activation_change, defender.layers, settings.p)


PAPER: dict[str, Any] = {
    **{"preset": "paper", "selection": "frg", "scope": "layer"},
    **{"masked": False, "unlearn": False, "distill": 0.0, "interpolate": 0.0},
}
NONE = {**PAPER, "selection": "none"}
STRONG = {"preset": "strong"}
ROWS: dict[str, Ablation] = {
    "ft": Ablation(NONE),
    **{f"random-{seed}": Ablation(NONE, _at_random(seed)) for seed in (1, 2, 3)},
    "layer": Ablation(PAPER),
    "global": Ablation({**PAPER, "scope": "global"}),
    "layer-pruned": Ablation({**PAPER, "epochs": 0}),
    "oracle": Ablation(NONE, _oracle),
    "oracle-pruned": Ablation({**NONE, "epochs": 0}, _oracle),
    "strong": Ablation(STRONG),
    "strong-moved": Ablation({**STRONG, "epochs": 0}, _strong_with(_highest_change)),
    "strong-pruned": Ablation({**STRONG, "epochs": 0}),
    "strong-unpruned": Ablation(STRONG, _strong_with(lambda _, defender, __: select_none(defender.layers).mask)),
    "strong-random": Ablation(
        STRONG, _strong_with(lambda _, defender, s: select_at_random(defender.layers, s.p, s.scope, 1).mask)
    ),
    "strong-unmasked": Ablation({**STRONG, "masked": False}),
    "strong-clean": Ablation({**STRONG, "unlearn": False}),
    "strong-undistilled": Ablation({**STRONG, "distill": 0.0}),
    "strong-uninterpolated": Ablation({**STRONG, "interpolate": 0.0}),
}


def activation_change(inputs: Inputs) -> Tensor:
    """TAC of the attacked model on pairs of clean and poisoned test images, float64 ``[N]``."""
    clean, poisoned, _ = paired_images(inputs.test, PAIRS)
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
        raise UserError(f"--{given} is what the rows differ in; leave it out.")
    tac = activation_change(inputs)
    table: list[dict[str, Any]] = []
    for row in rows:
        run = _run_of(row, tac, flags, make)
        folder = Path(inputs.record.folder) / "defense" / run.settings.defense_name
        metrics = _finished(folder, run, row, inputs.subset) or run.defense(flags["result_file"])["metrics"]
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


def _finished(folder: Path, run: Any, row: str, subset: Sequence[int]) -> dict[str, Any] | None:
    """The metrics of an earlier run with the same settings, clean ``subset`` and versions."""
    path = folder / "metrics.json"
    if run.settings.fresh or not path.is_file():
        return None
    metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    same_subset = (folder / "index.txt").read_text().split() == [str(position) for position in subset]
    wanted = json.loads(json.dumps(vars(run.settings), default=str))
    now = (wanted, _selected_by(row) if ROWS[row].select else None, versions())
    return metrics if same_subset and now == tuple(metrics[key] for key in ("settings", "chosen_by", "versions")) else None


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
        table = ablate(inputs, rows or list(ROWS), {**flags, "result_file": record}, make)
        table.insert(0, "record", record)
        tables.append(table)
    whole = pd.concat(tables)
    if csv:
        with replacing(csv) as temporary:
            whole.to_csv(temporary, index=False)
    print(f"\n{as_text(whole)}")
