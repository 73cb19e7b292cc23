"""The feature maps of each layer as the page's script draws them, and what other p would prune."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fmp_core.frg.scores import layer_slices, lowest
from fmp_core.report.data import Run, Trigger

OTHER_P = (8, 16, 32, 64, 128)


class Pruning(NamedTuple):
    """What a cut at ``p`` prunes: ``mask``, ``tied`` bool ``[N_maps]`` (maps whose count of correct images equals that of a
    cut they straddle). ``p`` is None where an inverted trigger selected, and there is no cut."""

    p: int | None
    mask: Tensor
    tied: Tensor


def own_pruning(run: Run) -> Pruning:
    """What the run pruned."""
    if run.scored:
        return Pruning(run.p, *lowest(run.scores, run.p, run.scope))
    pruned = run.of_maps("pruned")
    return Pruning(None, pruned, torch.zeros_like(pruned))


def prunings(run: Run) -> list[Pruning]:
    """The run's own pruning and, if FRG scored all maps in full, those of the other p that prune any."""
    if not run.scored:
        return [own_pruning(run)]
    whole = run.scores.settled is None or bool(run.scores.settled.all())  # else racing left other cuts to its predictions
    every = (Pruning(p, *lowest(run.scores, p, run.scope)) for p in (sorted({*OTHER_P, run.p}) if whole else [run.p]))
    return [pruning for pruning in every if pruning.mask.any() or pruning.p == run.p]


def p_table(run: Run, trigger: Trigger | None) -> list[dict[str, Any]]:
    """One row for each p: maps pruned, maps tied at a cut, and the precision against TAC if that is known."""
    rows = []
    for p, mask, tied in prunings(run) if run.scored else ():
        precision = trigger.precision(mask) if trigger and mask.any() else None
        rows.append({"p": p, "pruned": int(mask.sum()), "tied": int(tied.sum()), "precision": precision})
    return rows


def strips(run: Run, trigger: Trigger | None) -> dict[str, Any]:
    """What the script draws: every feature map of every layer, in execution order, lowest score first.

    ``choices`` are the p to choose from, ``own`` the run's. ``cuts`` of a layer holds for each of them how many of its maps are
    pruned, the first and last place of the tied (-1: none), how many those are, and how many pruned maps are among those of
    highest TAC (None: not known).
    """
    options = prunings(run)
    order = run.scores.order() if run.scored else run.of_maps("moved").argsort(descending=True, stable=True)
    ranks = trigger.ranks() if trigger else None
    layers = []
    for layer, positions in layer_slices(run.layers):
        places = order[(order >= positions.start) & (order < positions.stop)]
        maps = run.maps.iloc[places.numpy()]
        drawn: dict[str, Any] = {"name": layer.name, "channel": maps["channel"].tolist()}
        if run.scored:
            drawn |= {"correct": maps["correct"].tolist(), "margin": _short(maps["margin"].tolist())}
        else:
            drawn["change"] = _short(maps["moved"].tolist())
        if trigger and ranks is not None:
            drawn |= {"tac": _short(trigger.tac[places].tolist()), "tacRank": ranks[places].tolist()}
        layers.append({**drawn, "cuts": [_cut(option, places, ranks) for option in options]})
    choices = [option.p for option in options]
    own, samples = (choices.index(run.p), run.scores.samples) if run.scored else (0, 0)
    return {"samples": samples, "choices": choices, "own": own, "scope": run.scope, "layers": layers}


def _cut(option: Pruning, places: Tensor, ranks: Tensor | None) -> list[int | None]:
    """The entry of one layer, whose maps in the order drawn are ``places``, for :func:`strips`."""
    pruned = int(option.mask[places].sum())
    tied = option.tied[places].nonzero().flatten().tolist() or [-1]
    found = None if ranks is None else int((option.mask[places] & (ranks[places] <= pruned)).sum())
    return [pruned, tied[0], tied[-1], int(option.tied[places].sum()), found]


def _short(numbers: list[float]) -> list[float | None]:
    """Four digits; None for NaN and infinity, which JSON does not have."""
    return [float(f"{number:.4g}") if math.isfinite(number) else None for number in numbers]
