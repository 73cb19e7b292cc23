"""Ablations: FMP with another selection of feature maps, or without one of its parts, on the same clean subset.

The rows ``oracle...`` look at the poisoned test set on purpose, to show what a perfect ranking would do; they are no defense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fmp_core.inputs import DefenderInputs
from fmp_core.selection.choice import Selection, highest_in_each_layer, select_at_random, select_none, shuffled_in_each_layer
from fmp_core.selection.select import select_feature_maps
from fmp_core.settings import Settings
from fmp_core.system import distributed
from fmp_core.system.cli import Stages

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
    """The selection of ``--preset strong``, verdict and triggers included, with another mask."""

    def select(_tac: Tensor, defender: DefenderInputs, settings: Settings, cache: Path, stages: Stages) -> Selection:
        selection = select_feature_maps(defender, settings, cache, stages)
        if not distributed.is_leader():  # which alone goes on from here
            return selection
        return replace(selection, mask=mask_of(selection, defender, settings), ties=0, scores=None)

    return select


def _highest_change(selection: Selection, defender: DefenderInputs, settings: Settings) -> Tensor:
    if selection.activation_change is None:  # no target was named: `strong` itself takes N/p of each layer, by FRG
        return selection.mask
    return highest_in_each_layer(selection.activation_change, defender.layers, settings.p)


PAPER: dict[str, Any] = {
    **{"preset": "paper", "selection": "frg", "scope": "layer"},
    **{"masked": False, "unlearn": 0.0, "distill": 0.0, "interpolate": 0.0},
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
        STRONG, _strong_with(lambda selection, defender, _: shuffled_in_each_layer(selection.mask, defender.layers, 1))
    ),
    "strong-unmasked": Ablation({**STRONG, "masked": False}),
    "strong-clean": Ablation({**STRONG, "unlearn": 0.0}),
    "strong-undistilled": Ablation({**STRONG, "distill": 0.0}),
    "strong-uninterpolated": Ablation({**STRONG, "interpolate": 0.0}),
}
