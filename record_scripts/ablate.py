#!/usr/bin/env python3
"""What does each part of FMP do? The same clean subset and fine-tuning after different choices of the maps to prune.

    python record_scripts/ablate.py --result_file badnet_cifar10 blended_cifar10 --frequency_test 0
    python record_scripts/ablate.py --result_file badnet_cifar10 --rows ft layer oracle --epochs 3 --test_images 2000
    python record_scripts/ablate.py --result_file blended_cifar10 --overlap --maps 1200

Rows: ``ft`` fine-tuning only; ``random-1..3`` as many maps per layer as ``layer``, by chance; ``layer`` FMP as released;
``global`` FMP as in the paper's text; ``layer-pruned`` without fine-tuning; ``oracle`` the maps the trigger moves most (it
looks at the poisoned test set, so it is no defense); ``oracle-pruned``.

``strong`` is our preset, ``strong-pruned`` without its fine-tuning, ``strong-moved`` that with N/p of each layer instead of the
budget. And the preset but for one part: ``strong-unpruned``, ``strong-random`` (N/p of each layer by chance),
``strong-unmasked``, ``strong-clean`` (nothing is unlearned), ``strong-undistilled``.

Other flags are FMP's. Each row is an FMP run in ``record/<name>/defense/ablate-<row>``; rows done with the same flags and
versions are not run again. ``--test_images`` tests on the first images of the clean test set only, and on the poisoned ones
made from them.

``--overlap`` prunes nothing: how well the paper's count, the class shift and reversed triggers find the maps the trigger moves
most (TAC), by images, eps and steps, on an even sample of maps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

sys.path.append(str(Path(__file__).resolve().parents[1] / "defense"))

import numpy as np
import pandas as pd
import torch
from fmp import FMP
from fmp_core import report
from fmp_core.activation_change import precision_at, trigger_activation_change
from fmp_core.compute import choose_dtype
from fmp_core.errors import UserError
from fmp_core.evaluate import TestData, to_unit
from fmp_core.feature_maps import ConvLayer
from fmp_core.files import replacing
from fmp_core.interrupts import Terminated, stopping_gently
from fmp_core.ranking import Choice, Scores, choose_by_chance, score_feature_maps, slices
from fmp_core.records import AttackRecord
from fmp_core.report_data import twins
from fmp_core.report_findings import ROWS_DIFFER_IN
from fmp_core.reversed_trigger import FAMILIES
from fmp_core.selection import Selector
from sklearn.metrics import roc_auc_score
from torch import Tensor

TAC_IMAGES = 512
Chooser = Callable[["Ablated"], Tensor]


def by_chance(number: int) -> Chooser:
    return lambda run: choose_by_chance(run.layers, run.settings.p, run.settings.scope, number).mask


def nothing(run: Ablated) -> Tensor:
    return torch.zeros(len(run.tac), dtype=torch.bool)


def by_trigger(run: Ablated) -> Tensor:
    """The N/p maps of each layer that the trigger moves most."""
    return _highest(run.tac, run)


def by_reversed_trigger(run: Ablated) -> Tensor:
    """The N/p maps of each layer that a reversed trigger moves most; none where no backdoor is shown."""
    selector = FMP.selector(run)
    evidence, search = selector.evidence(run.record.num_classes), selector.trigger_search()
    if not evidence.backdoored:
        return nothing(run)
    return _highest(search.moved(search.triggers([evidence.family], evidence.target)[0]), run)


def _highest(score: Tensor, run: Ablated) -> Tensor:
    mask = torch.zeros(len(score), dtype=torch.bool)
    for layer, where in slices(run.layers):
        mask[score[where].topk(layer.channels // run.settings.p).indices + where.start] = True
    return mask


PAPER = {"preset": "paper", "selection": "frg", "scope": "layer", "masked": False, "unlearn": False, "distill": 0.0}
STRONG: dict[str, Any] = {"preset": "strong"}
NONE = {**PAPER, "selection": "none"}  # by FMP itself; a chooser says what is pruned instead
ROWS: dict[str, tuple[dict[str, Any], Chooser | None]] = {
    "ft": (NONE, None),
    **{f"random-{number}": (NONE, by_chance(number)) for number in (1, 2, 3)},
    "layer": (PAPER, None),
    "global": ({**PAPER, "scope": "global"}, None),
    "layer-pruned": ({**PAPER, "epochs": 0}, None),
    "oracle": (NONE, by_trigger),
    "oracle-pruned": ({**NONE, "epochs": 0}, by_trigger),
    "strong": (STRONG, None),
    "strong-moved": ({**STRONG, "epochs": 0}, by_reversed_trigger),
    "strong-pruned": ({**STRONG, "epochs": 0}, None),
    "strong-unpruned": (STRONG, nothing),
    "strong-random": (STRONG, by_chance(1)),
    "strong-unmasked": ({**STRONG, "masked": False}, None),
    "strong-clean": ({**STRONG, "unlearn": False}, None),
    "strong-undistilled": ({**STRONG, "distill": 0.0}, None),
}


class Ablated(FMP):
    """FMP with another choice of maps (None: its own), tested on fewer images.

    ``tac`` float64 ``[N]`` is :func:`activation_change` of the record, for the oracle.
    """

    def __init__(self, args: dict[str, Any], test_images: int | None = None, chooser: Chooser | None = None):
        super().__init__(args)
        self.test_images, self.chooser = test_images, chooser
        self.tac = torch.empty(0)

    def set_result(self, result_file: str) -> None:
        super().set_result(result_file)
        if self.test_images is not None:
            self.record, self.test_data = first_images(self.record, self.test_data, self.test_images)

    def selector(self) -> Selector:
        usual = super().selector()
        if self.chooser is None:
            return usual
        return Told(**{field.name: getattr(usual, field.name) for field in dataclasses.fields(usual)}, mask=self.chooser(self))


@dataclasses.dataclass(frozen=True)
class Told(Selector):
    """Prunes what it is told to."""

    mask: Tensor

    def choose(self, scores: Scores | None, trigger: object) -> Choice:
        return Choice(self.mask)


def first_images(record: AttackRecord, data: TestData, count: int) -> tuple[AttackRecord, TestData]:
    """The first ``count`` clean test images, the poisoned ones made from them, and the record of these."""
    twins(record, data, 1)  # refuses a record that does not say which image was made from which
    indices = record.bd_test.indices
    assert indices is not None
    rows = (indices < count).nonzero().flatten()
    if not len(rows):
        raise UserError(f"--test_images {count} leaves no poisoned image; take more.")
    kept = rows.to(data.targets.device)
    clean, poisoned = (data.clean_images, data.clean_labels), (data.poisoned_images, data.targets, data.originals)
    fewer = TestData(*(part[:count] for part in clean), *(part[kept] for part in poisoned))
    return dataclasses.replace(record, bd_test=dataclasses.replace(record.bd_test, indices=indices[rows])), fewer


def activation_change(run: FMP) -> Tensor:
    """TAC of all maps on an even sample of poisoned test images and their clean twins, float64 ``[N]``."""
    clean, poisoned, _ = twins(run.record, run.test_data, TAC_IMAGES)
    return trigger_activation_change(run.model, run.layers, to_unit(clean), to_unit(poisoned))


def ablate(record: str, rows: Sequence[str], flags: dict[str, Any], test_images: int | None = None) -> pd.DataFrame:
    """One row each for the attacked model and every choice of maps, in percent; ``precision`` is against TAC."""
    for name in (*ROWS_DIFFER_IN, "defense_name"):
        if name in flags:
            raise UserError(f"--{name} is what the rows differ in; leave it out.")
    found: list[dict[str, Any]] = []
    attacked = Ablated({**flags, "result_file": record}, test_images)
    attacked.set_result(record)
    tac = activation_change(attacked)
    only = f"-{test_images}" if test_images else ""
    for row in rows:
        settings, chooser = ROWS[row]
        args = {"report": False, **flags, **settings, "result_file": record, "defense_name": f"ablate-{row}{only}"}
        run = Ablated(args, test_images, chooser)
        run.tac = tac
        if chooser or test_images:
            run.chosen_by = f"ablate.py --rows {row}" + (f" --test_images {test_images}" if test_images else "")
        folder = Path(run.settings.record_root) / record / "defense" / run.settings.defense_name
        metrics = _done(folder, run, attacked.subset) or run.defense(record)["metrics"]
        if not found:
            found.append({"row": "(attacked)", **_percent(metrics["before"])})
        mask = torch.tensor(pd.read_csv(folder / "feature_maps.csv")["pruned"].tolist())
        found.append(
            {
                "row": row,
                "maps": metrics["pruned"],
                **_percent(metrics["after"]),
                "precision": round(precision_at(mask, tac, attacked.layers).value, 2),
            }
        )
        print(_table(pd.DataFrame(found)), flush=True)
    return pd.DataFrame(found)


def _done(folder: Path, run: FMP, subset: Sequence[int]) -> dict[str, Any] | None:
    """The metrics of an earlier run with the same settings, clean ``subset`` and versions."""
    path = folder / "metrics.json"
    if run.settings.fresh or not path.is_file():
        return None
    metrics = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(dataclasses.asdict(run.settings)))
    now = (wanted, run.chosen_by, report.versions())
    same_subset = (folder / "index.txt").read_text(encoding="utf-8").split() == [str(position) for position in subset]
    return metrics if same_subset and now == tuple(metrics[key] for key in ("settings", "chosen_by", "versions")) else None


def _percent(metrics: dict[str, float]) -> dict[str, float]:
    return {name: round(100 * metrics[f"test_{name.lower()}"], 2) for name in ("Acc", "ASR", "RA")}


class Look(NamedTuple):
    """One way for FRG to look at feature maps."""

    eps: float
    steps: int
    images: int


LOOKS = [Look(1 / 255, 1, images) for images in (8, 16, 32, 64)]
LOOKS += [Look(eps / 255, 1, 16) for eps in (4, 8, 16)] + [Look(4 / 255, 3, 16)]


def overlap(record: str, maps: int, p: int, flags: dict[str, Any], test_images: int | None = None) -> pd.DataFrame:
    """Precision at N/p and AUC (maps of highest TAC, 1/p of each layer, against the rest) of scores, mean over layers.

    Per look of FRG: the paper's count (ties by margin), the largest class's shift, and the shift towards the class voted for.
    Per family of reversed triggers, towards the class that the evidence names: how far the trigger moves a map.
    """
    run = Ablated({**flags, "result_file": record}, test_images)
    run.set_result(record)
    tac = activation_change(run)
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
        print(_table(pd.DataFrame(found)), flush=True)
    selector = run.selector()
    evidence = selector.evidence(run.record.num_classes)
    for trigger in selector.trigger_search().triggers(FAMILIES, evidence.target):
        precision, auc = _agreement(selector.trigger_search().moved(trigger), wanted, tac, p, run.layers)
        found.append({"trigger": trigger.family, "moved precision": precision, "moved AUC": auc, "voted": evidence.target})
    print(_table(pd.DataFrame(found)), flush=True)
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


def _table(frame: pd.DataFrame) -> str:
    return frame.to_string(index=False, na_rep="")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ablate: {message}; --help lists the flags.\n")


def _whole(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--result_file", nargs="+", required=True, metavar="RECORD")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--test_images", type=_whole, metavar="N", help="test on the first N clean test images only")
    parser.add_argument("--overlap", action="store_true", help="rank only, and compare scores with TAC")
    parser.add_argument(
        "--maps", type=_whole, default=1200, help="with --overlap: size of the even sample of feature maps (1200)"
    )
    parser.add_argument("--csv", type=Path, help="write the tables of all records there")
    args, rest = parser.parse_known_args(argv)
    fmp_parser = _Parser(prog="ablate", allow_abbrev=False)
    FMP.add_arguments(fmp_parser)
    flags = {key: value for key, value in vars(fmp_parser.parse_args(rest)).items() if value is not None}
    tables = []
    try:
        for record in args.result_file:
            with stopping_gently():
                if args.overlap:
                    frame = overlap(record, args.maps, 16, flags, args.test_images)
                else:
                    frame = ablate(record, args.rows, flags, args.test_images)
            frame.insert(0, "record", record)
            tables.append(frame)
        whole = pd.concat(tables)
        if args.csv:
            with replacing(args.csv) as temporary:
                whole.to_csv(temporary, index=False)
    except UserError as error:
        print(f"ablate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("ablate: stopped; run the same command again to go on.", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    print(f"\n{_table(whole)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
