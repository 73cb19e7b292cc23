"""How well do the paper's count, the class shift and reversed triggers find the maps the trigger moves? For ``ablate.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from fmp import FMP
from fmp_core.compute import choose_dtype
from fmp_core.errors import UserError
from fmp_core.evaluate import to_unit
from fmp_core.feature_maps import ConvLayer
from fmp_core.ranking import Scores, score_feature_maps, slices
from fmp_core.reversed_trigger import FAMILIES
from sklearn.metrics import roc_auc_score
from torch import Tensor


class Look(NamedTuple):
    """One way for FRG to look at feature maps."""

    eps: float
    steps: int
    images: int


LOOKS = [Look(1 / 255, 1, images) for images in (8, 16, 32, 64)]
LOOKS += [Look(eps / 255, 1, 16) for eps in (4, 8, 16)] + [Look(4 / 255, 3, 16)]


def overlap(run: FMP, tac: Tensor, maps: int, p: int) -> pd.DataFrame:
    """Precision at N/p and AUC (maps of highest TAC, 1/p of each layer, against the rest) of scores, mean over layers.

    Per look of FRG: the paper's count (ties by margin), the largest class's shift, and the shift towards the class voted for.
    Per family of reversed triggers, towards the class that the evidence names: how far the trigger moves a map.

    Args:
        run: has read its record (``set_result``).
        tac: float64 ``[N]``, how far the true trigger moves each of the N maps.
        maps: size of the even sample of maps that are compared.

    Raises:
        UserError: ``maps`` are too few.
    """
    wanted = torch.zeros(len(tac), dtype=torch.bool)
    wanted[torch.linspace(0, len(tac) - 1, min(maps, len(tac))).round().long()] = True
    if all(int(wanted[where].sum()) < p for _, where in slices(run.layers)):
        raise UserError(f"--maps {maps} takes fewer than {p} maps of every layer, too few to compare; take more.")
    dtype = choose_dtype(run.settings.dtype, run.compute.device)
    found = []
    for look in LOOKS:
        said = torch.zeros(len(tac), look.images, run.record.num_classes, device=run.compute.device)

        def keep(where: Tensor, reverse: Tensor, logits: Tensor, first: int, said: Tensor = said) -> None:
            said[where, first : first + logits.shape[1]] = logits

        scores = score_feature_maps(
            run.model,
            run.layers,
            to_unit(run.clean_images[: look.images]),
            run.clean_labels[: look.images],
            eps=look.eps,
            steps=look.steps,
            seed=run.settings.random_seed,
            dtype=dtype,
            wanted=wanted,
            watch=keep,
        )
        row: dict[str, Any] = {**look._asdict(), "eps": f"{255 * look.eps:.0f}/255"}
        row |= _compare(scores, said[:, : scores.samples].double().mean(1).cpu(), wanted, tac, p)
        found.append(row)
        print(table(pd.DataFrame(found)), flush=True)
    selector = run.selector()
    evidence = selector.evidence(run.record.num_classes)
    for trigger in selector.trigger_search().triggers(FAMILIES, evidence.target):
        precision, auc = _agreement(selector.trigger_search().moved(trigger), wanted, tac, p, run.layers)
        found.append({"trigger": trigger.family, "moved precision": precision, "moved AUC": auc, "voted": evidence.target})
    print(table(pd.DataFrame(found)), flush=True)
    return pd.DataFrame(found)


def _agreement(score: Tensor, wanted: Tensor, tac: Tensor, p: int, layers: Sequence[ConvLayer]) -> tuple[float, float]:
    """Precision at N/p and AUC of one score, means over layers; one with fewer than ``p`` sampled maps is left out."""
    pairs = []
    for _, where in slices(layers):
        part = where.start + wanted[where].nonzero().flatten()
        k = len(part) // p
        if not k:
            continue
        moved = torch.zeros(len(part), dtype=torch.bool)
        moved[tac[part].topk(k).indices] = True
        precision = float(moved[score[part].topk(k).indices].double().mean())
        pairs.append((precision, float(roc_auc_score(moved.numpy(), score[part].numpy()))))
    precision, auc = (round(float(np.mean(column)), 2) for column in zip(*pairs, strict=True))
    return precision, auc


def _compare(scores: Scores, logits: Tensor, wanted: Tensor, tac: Tensor, p: int) -> dict[str, Any]:
    """How three scores of one look agree with TAC, and which class they vote for; ``logits`` ``[N, K]``: means over images."""
    shift = torch.zeros_like(logits)
    leaders = []
    for _, where in slices(scores.layers):
        part = where.start + wanted[where].nonzero().flatten()
        shift[part] = logits[part] - logits[part].mean(0)
        leaders.append(part[shift[part].max(1).values.topk(min(len(part), max(1, len(part) // p))).indices])
    votes = shift[torch.cat(leaders)].argmax(1)
    target = int(votes.mode().values)
    suspicion = torch.empty(scores.total, dtype=torch.float64)
    suspicion[scores.order()] = torch.arange(scores.total, 0, -1, dtype=torch.float64)
    row: dict[str, Any] = {}
    for name, values in (("count", suspicion), ("shift", shift.max(1).values), ("shift to voted", shift[:, target])):
        row[f"{name} precision"], row[f"{name} AUC"] = _agreement(values, wanted, tac, p, scores.layers)
    return {**row, "voted": target, "votes": f"{int((votes == target).sum())}/{len(votes)}"}


def table(frame: pd.DataFrame) -> str:
    """As text, without the index; cells without a value stay empty."""
    return frame.to_string(index=False, na_rep="")
