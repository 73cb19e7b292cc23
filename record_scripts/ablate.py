#!/usr/bin/env python3
"""What does each part of FMP do? The same clean subset and fine-tuning after different choices of the maps to prune.

    python record_scripts/ablate.py --result_file badnet_cifar10 blended_cifar10 --frequency_test 0
    python record_scripts/ablate.py --result_file badnet_cifar10 --rows ft layer oracle --epochs 3 --test_images 2000

Rows: ``ft`` fine-tuning only; ``random-1..3`` as many maps per layer as ``layer``, by chance; ``layer`` FMP as released;
``global`` FMP as in the paper's text; ``layer-pruned`` without fine-tuning; ``oracle`` the maps the trigger moves most (it
looks at the poisoned test set, so it is no defense); ``oracle-pruned``.

``strong`` is our preset, ``strong-pruned`` without its fine-tuning, ``strong-moved`` that with N/p of each layer instead of the
budget. And the preset but for one part: ``strong-unpruned``, ``strong-random`` (N/p of each layer by chance),
``strong-unmasked``, ``strong-clean`` (nothing is unlearned), ``strong-undistilled``.

Other flags are FMP's. Each row is an FMP run in ``record/<name>/defense/ablate-<row>``; rows done with the same flags and
versions are not run again. ``--test_images`` tests on the first images of the clean test set only, and on the poisoned ones
made from them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

sys.path.append(str(Path(__file__).resolve().parents[1] / "defense"))

import pandas as pd
import torch
from fmp import FMP
from fmp_core.data.attack_record import AttackRecord
from fmp_core.errors import UserError
from fmp_core.frg.scorer import Choice, Scores, choose_by_chance, slices
from fmp_core.inversion.trigger import InvertedTrigger
from fmp_core.models.activation_change import precision_at, trigger_activation_change
from fmp_core.models.evaluate import TestData, to_unit
from fmp_core.report.data import twins
from fmp_core.report.findings import ROWS_DIFFER_IN
from fmp_core.results import run_folder
from fmp_core.selection.select import Selector
from fmp_core.storage.files import replacing
from fmp_core.system.interrupts import Terminated, stopping_gently
from torch import Tensor

TAC_IMAGES = 512
Chooser = Callable[["Ablated", InvertedTrigger | None], Tensor]


def by_chance(number: int) -> Chooser:
    return lambda run, _trigger: choose_by_chance(run.layers, run.settings.p, run.settings.scope, number).mask


def nothing(run: Ablated, _trigger: InvertedTrigger | None = None) -> Tensor:
    return torch.zeros(sum(layer.channels for layer in run.layers), dtype=torch.bool)


def by_trigger(run: Ablated, _trigger: InvertedTrigger | None) -> Tensor:
    """The N/p maps of each layer that the trigger moves most."""
    assert run.tac is not None
    return _highest(run.tac, run)


def by_reversed_trigger(run: Ablated, trigger: InvertedTrigger | None) -> Tensor:
    """The N/p maps of each layer that the inverted trigger moves most; none where no backdoor is shown."""
    return nothing(run) if trigger is None else _highest(run.selector().trigger_search().moved(trigger), run)


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

    def __init__(
        self,
        args: dict[str, Any],
        test_images: int | None,
        tac: Tensor | None = None,
        chooser: Chooser | None = None,
        chosen_by: str | None = None,
    ):
        super().__init__(args)
        self.test_images, self.tac, self.chooser, self.chosen_by = test_images, tac, chooser, chosen_by

    def set_result(self, result_file: str) -> None:
        super().set_result(result_file)
        if self.test_images is not None:
            self.record, self.test_data = first_images(self.record, self.test_data, self.test_images)

    def selector(self) -> Selector:
        usual = super().selector()
        if self.chooser is None:
            return usual
        fields = {field.name: getattr(usual, field.name) for field in dataclasses.fields(usual)}
        return Told(**fields, told=partial(self.chooser, self))


@dataclasses.dataclass(frozen=True)
class Told(Selector):
    """Prunes what it is told to."""

    told: Callable[[InvertedTrigger | None], Tensor]

    def choose(self, scores: Scores | None, trigger: InvertedTrigger | None) -> Choice:
        return Choice(self.told(trigger))


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


def ablate(attacked: Ablated, tac: Tensor, rows: Sequence[str], flags: dict[str, Any]) -> pd.DataFrame:
    """One row each for the attacked model and every choice of maps, in percent; ``precision`` is against ``tac``.

    ``attacked`` has read the record; ``flags`` are FMP's.
    """
    found: list[dict[str, Any]] = []
    record, test_images = attacked.settings.result_file or "", attacked.test_images
    only, words = (f"-{test_images}", f" --test_images {test_images}") if test_images else ("", "")
    for row in rows:
        settings, chooser = ROWS[row]
        args = {"report": False, **flags, **settings, "result_file": record, "defense_name": f"ablate-{row}{only}"}
        run = Ablated(args, test_images, tac, chooser, f"ablate.py --rows {row}{words}" if chooser or words else None)
        folder = attacked.record.folder / "defense" / run.settings.defense_name
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
        print(table(pd.DataFrame(found)), flush=True)
    return pd.DataFrame(found)


def _done(folder: Path, run: FMP, subset: Sequence[int]) -> dict[str, Any] | None:
    """The metrics of an earlier run with the same settings, clean ``subset`` and versions."""
    path = folder / "metrics.json"
    if run.settings.fresh or not path.is_file():
        return None
    metrics = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(dataclasses.asdict(run.settings)))
    now = (wanted, run.chosen_by, run_folder.versions())
    same_subset = (folder / "index.txt").read_text(encoding="utf-8").split() == [str(position) for position in subset]
    return metrics if same_subset and now == tuple(metrics[key] for key in ("settings", "chosen_by", "versions")) else None


def _percent(metrics: dict[str, float]) -> dict[str, float]:
    return {name: round(100 * metrics[f"test_{name.lower()}"], 2) for name in ("Acc", "ASR", "RA")}


def table(frame: pd.DataFrame) -> str:
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
    parser.add_argument("--csv", type=Path, help="write the tables of all records there")
    args, rest = parser.parse_known_args(argv)
    fmp_parser = _Parser(prog="ablate", allow_abbrev=False)
    FMP.add_arguments(fmp_parser)
    flags = {key: value for key, value in vars(fmp_parser.parse_args(rest)).items() if value is not None}
    tables = []
    try:
        named = [name for name in (*ROWS_DIFFER_IN, "defense_name") if name in flags]
        if named:
            raise UserError(f"--{named[0]} is what the rows differ in; leave it out.")
        for record in args.result_file:
            with stopping_gently():
                run = Ablated({**flags, "result_file": record}, args.test_images)
                run.set_result(record)
                tac = activation_change(run)
                frame = ablate(run, tac, args.rows, flags)
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
    print(f"\n{table(whole)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
