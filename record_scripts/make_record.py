#!/usr/bin/env python3
"""Make a genuine attack record without BackdoorBench.

    python record_scripts/make_record.py                       # demo: BadNets on scikit-learn's digits, resnet18
    python record_scripts/make_record.py --attack wanet --dataset cifar10 --model preactresnet18
    python record_scripts/make_record.py --pratio 0 --save_folder_name control    # the model never saw the trigger

poisons the training set, trains the model, and writes ``record/<save_folder_name>/`` in BackdoorBench's format. A killed run
goes on from its last finished epoch when repeated. The digits come with scikit-learn and are laid out as an image folder below
``data/digits``; any other dataset must lie below ``--dataset_path`` as BackdoorBench keeps it. docs/records.md describes the
attacks.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shutil
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pprint import pformat
from typing import Any, NoReturn

sys.path.append(str(Path(__file__).resolve().parents[1] / "defense"))

import numpy as np
import pandas as pd
import torch
from fmp_core.attacks.poisoning import Poison, poison
from fmp_core.attacks.settings import AttackSettings, add_attack_arguments, attack_settings
from fmp_core.attacks.train_model import AttackEpoch, CleanMetrics, clean_metrics, recipe, train_attacked_model, training_set
from fmp_core.data.attack_record import write_attack_record
from fmp_core.data.datasets import FACTS, DatasetFacts, Split, dataset_facts, open_split
from fmp_core.data.digits import SIZE as DIGITS_SIZE
from fmp_core.data.digits import make_digits
from fmp_core.errors import UserError
from fmp_core.fields import add_flags, parse_flags
from fmp_core.models.build import MODEL_NAMES, PixelModel, build_model
from fmp_core.models.evaluate import Metrics, TestData, evaluate
from fmp_core.results.run_folder import history_frame, summary_frame, versions, write_csv, write_plots
from fmp_core.settings import Settings, training_settings
from fmp_core.storage.checkpoint import Checkpoint, content_key
from fmp_core.storage.files import make_folders, write_torch
from fmp_core.system.devices import choose_device, make_deterministic
from torch import Tensor

TRAINING = training_settings()  # flags here too; the first three default to the dataset's recipe
HELP = {  # where fmp.py's words do not fit
    "epochs": "training epochs",
    "batch_size": "batch size of training and evaluation",
    "amp": "train under bfloat16 autocast where the device has it in hardware",
    "random_seed": "seed of the poisoned images and of training",
}
LOGGER = logging.getLogger("fmp_core")


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known before training: what is attacked, with what, and the images that come of it."""

    folder: Path
    attack: AttackSettings
    training: dict[str, Any]
    facts: DatasetFacts
    num_classes: int
    train_set: Split
    test_set: Split
    poison: Poison | None

    @property
    def unfinished(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.unfinished")


def make_plan(args: argparse.Namespace) -> Plan:
    """Check the flags, read the dataset and poison it. Nothing is written but ``data/digits``.

    Raises:
        UserError: the record exists already, or a flag, the dataset or a trigger file is not usable.
    """
    attack = attack_settings(args)
    folder = Path(args.record_root) / (args.save_folder_name or f"{attack.attack}_{args.dataset}")
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it or choose another --save_folder_name.")
    given = parse_flags(Settings, {name: getattr(args, name) for name in TRAINING})
    if given.get("epochs") == 0:
        raise UserError("--epochs is 0, but a model must be trained for at least one epoch.")
    size = FACTS[args.dataset].size if args.dataset in FACTS else (args.image_size, args.image_size, 3)
    facts = dataset_facts(args.dataset, size)
    if args.dataset == "digits":
        make_digits(Path(args.dataset_path) / "digits")
    train_set, test_set = (open_split(args.dataset_path, args.dataset, train, size) for train in (True, False))
    num_classes = facts.num_classes or int(train_set.labels.max()) + 1
    attack.check(num_classes)
    clean = attack.attack == "none"
    poisoned = None if clean else poison(train_set, test_set, attack, size, num_classes, given.get("random_seed", 0))
    return Plan(folder, attack, given, facts, num_classes, train_set, test_set, poisoned)


def make_record(args: argparse.Namespace) -> Path:
    """Poison, train, save. Returns the record folder, which appears whole (``.<name>.unfinished`` until then).

    Raises:
        UserError: see :func:`make_plan`; or an unfinished record was made with other settings, or training diverged.
    """
    plan = make_plan(args)
    compute = choose_device(plan.training.get("device", "auto"))
    make_deterministic()
    torch.manual_seed(plan.training.get("random_seed", 0))
    network = build_model(args.model, plan.num_classes)
    settings = Settings(**{**recipe(args.dataset, network), **plan.training})
    model = PixelModel(network, plan.facts).to(compute.device).to(memory_format=torch.channels_last)
    data = training_set(plan.train_set.read(range(len(plan.train_set))), plan.train_set.labels, plan.poison)

    if args.fresh:
        shutil.rmtree(plan.unfinished, ignore_errors=True)
    make_folders(plan.unfinished)
    for leftover in plan.unfinished.glob(".*"):  # of a run that was killed while it wrote a file
        leftover.unlink()
    made_with = {"model": args.model, "dataset": args.dataset, **dataclasses.asdict(plan.attack)}
    made_with |= {name: getattr(settings, name) for name in TRAINING if name != "device"}
    made_with["training images"] = content_key({}, data.images, data.labels, {})[:16]
    checkpoint = Checkpoint(plan.unfinished / "training.pt", made_with)
    with logging_to(plan.unfinished):
        LOGGER.debug("%s", pformat({**made_with, "device": compute.name, **versions(), "terminal_info": sys.argv}))
        count = len(plan.poison.train.indices) if plan.poison else 0
        LOGGER.info("%d of %d training images get the trigger", count, len(plan.train_set))
        measure = _measurement(plan, model, settings, compute.device)
        history = train_attacked_model(
            model, data.to(compute.device), measure, settings, compute, plan.facts, checkpoint, LOGGER
        )
        write_record(plan, args, settings, network.state_dict(), history)
    plan.unfinished.rename(plan.folder)
    Checkpoint(plan.folder / "training.pt", {}).remove()
    return plan.folder


def _measurement(
    plan: Plan, model: PixelModel, settings: Settings, device: torch.device
) -> Callable[[], Metrics | CleanMetrics]:
    images, labels = plan.test_set.read(range(len(plan.test_set))).to(device), plan.test_set.labels.to(device)
    if plan.poison is None:
        return lambda: clean_metrics(model, images, labels, settings.batch_size)
    bad = plan.poison.test
    targets, original = (torch.tensor(part, device=device) for part in (bad.targets, bad.original))
    data = TestData(images, labels, bad.images.to(device), targets, original)
    return lambda: evaluate(model, data, settings.batch_size).metrics


def write_record(
    plan: Plan, args: argparse.Namespace, settings: Settings, state: dict[str, Tensor], history: list[tuple[dict, dict]]
) -> None:
    """Write what BB's attack scripts leave into the unfinished folder, ``attack_result.pt`` last.

    A model that never saw a trigger is also saved as ``clean_model.pth``, as BB's ``prototype.py`` does. Without an attack
    there is nothing else: a record whose poisoned test set is not one would only mislead.
    """
    folder, size, attack = plan.unfinished, plan.facts.size, plan.attack
    info = {
        **vars(args),
        **dataclasses.asdict(attack),
        **{name: getattr(settings, name) for name in TRAINING},
        "attack": attack.bb_name,
    }
    info |= {"num_classes": plan.num_classes, "img_size": size, "terminal_info": sys.argv}
    info |= dict(zip(("input_height", "input_width", "input_channel"), size, strict=True))
    info |= {"save_folder_name": plan.folder.name, "save_path": f"./record/{plan.folder.name}"}
    info["dataset_path"] = f"{args.dataset_path}/{args.dataset}"
    write_torch(folder / "info.pickle", info)
    cpu_state = OrderedDict((key, value.detach().cpu()) for key, value in state.items())
    if plan.poison is None or not plan.poison.train.indices:
        write_torch(folder / "clean_model.pth", cpu_state)
    if plan.poison is None:
        rows = [{"epoch": epoch["epoch"], "batch": epoch["batch"], **metrics} for epoch, metrics in history]
        write_csv(folder / "attack_df.csv", pd.DataFrame(rows, dtype=object))
        return
    frame = history_frame([(AttackEpoch(**epoch), Metrics(**metrics)) for epoch, metrics in history])
    frame = frame.dropna(axis="columns", how="all")  # BB leaves out what is always None: accuracies of no poisoned images
    write_csv(folder / "attack_df.csv", frame)
    write_csv(folder / "attack_df_summary.csv", summary_frame(frame))
    write_plots(folder, frame)
    indicator = np.zeros(len(plan.train_set))
    indicator[plan.poison.train.indices] = 1
    write_torch(folder / "train_poison_index_list.pickle", indicator)
    write_attack_record(
        folder,
        name=plan.folder.name,
        model_name=args.model,
        num_classes=plan.num_classes,
        state=cpu_state,
        dataset=args.dataset,
        image_size=size,
        bd_train=plan.poison.recorded_train(),
        bd_test=plan.poison.test,
    )


@contextmanager
def logging_to(folder: Path) -> Iterator[None]:
    """Log all to ``<folder>/<time>.log`` in BB's format, and what a user waits for to the terminal."""
    file = logging.FileHandler(folder / f"{time.strftime('%Y_%m_%d_%H_%M_%S')}.log", encoding="utf-8")
    file.setFormatter(
        logging.Formatter("%(asctime)s [%(levelname)-8s] [%(filename)s:%(lineno)d] %(message)s", "%Y-%m-%d:%H:%M:%S")
    )
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setLevel(logging.INFO)
    LOGGER.setLevel(logging.DEBUG)
    LOGGER.propagate = False
    for handler in (file, terminal):
        LOGGER.addHandler(handler)
    try:
        yield
    finally:
        for handler in (file, terminal):
            LOGGER.removeHandler(handler)
        file.close()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"make_record: {message}; --help lists the flags.\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--save_folder_name", help="the record's name (default <attack>_<dataset>)")
    parser.add_argument("--record_root", default="./record")
    parser.add_argument("--dataset_path", default="./data")
    parser.add_argument("--dataset", default="digits", help=f"digits, {', '.join(FACTS)} or an image folder")
    parser.add_argument("--image_size", type=int, default=DIGITS_SIZE[0], help="pixels, for image folders (default 32)")
    parser.add_argument("--model", default="resnet18", choices=MODEL_NAMES, metavar="MODEL", help=", ".join(MODEL_NAMES))
    parser.add_argument("--fresh", action="store_true", help="start again instead of going on with an unfinished record")
    add_attack_arguments(parser.add_argument_group("attack"))
    group = parser.add_argument_group("training (epochs, batch size and rate default to the dataset's recipe)")
    add_flags(group, Settings, TRAINING, HELP, defaults=False)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    try:
        folder = make_record(parse(argv))
    except UserError as error:
        print(f"make_record: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("make_record: interrupted; run the same command again to go on.", file=sys.stderr)
        return 130
    print(f"record written to {folder} in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
