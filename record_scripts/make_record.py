#!/usr/bin/env python3
"""Make a genuine BadNets attack record without BackdoorBench.

    python record_scripts/make_record.py                       # demo: scikit-learn's digits, resnet18
    python record_scripts/make_record.py --dataset cifar10 --model preactresnet18 --save_folder_name badnet_cifar10

poisons a share of the training set with a white corner patch (Gu et al. 2017), trains the model, and writes
``record/<save_folder_name>/`` in BackdoorBench's format. The digits come with scikit-learn and are laid out as an image folder
below ``data/digits``; any other dataset must lie below ``--dataset_path`` as BackdoorBench keeps it.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "defense"))

import pandas as pd
import torch
from fmp_core.compute import choose_compute, make_deterministic
from fmp_core.datasets import FACTS, DatasetFacts, Split, dataset_facts, open_split
from fmp_core.errors import UserError
from fmp_core.evaluate import Metrics, TestData, evaluate
from fmp_core.files import write_torch
from fmp_core.finetune import Epoch, train
from fmp_core.models import MODEL_NAMES, PixelModel, build_model
from fmp_core.records import PoisonedImages, write_attack_record
from fmp_core.report import history_frame, summary_frame, write_csv, write_plots
from fmp_core.settings import Settings
from PIL import Image
from torch import Tensor

DIGITS_SIZE = (32, 32, 3)
DIGITS_TEST_SHARE = 0.25


def make_digits(folder: Path) -> None:
    """Lay scikit-learn's 1797 digits out as ``train|test/<class>/<index>.png``, 32x32 RGB, unless they are there."""
    if folder.is_dir():
        return
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = list(range(len(digits.target)))
    random.Random(0).shuffle(order)
    tests = int(len(order) * DIGITS_TEST_SHARE)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for position, index in enumerate(order):
        file = unfinished / ("test" if position < tests else "train") / str(digits.target[index]) / f"{index:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((digits.images[index] / 16 * 255).round().astype("uint8"))
        grey.resize(DIGITS_SIZE[:2], Image.Resampling.BILINEAR).convert("RGB").save(file)
    unfinished.rename(folder)


def add_patch(images: Tensor, side: int) -> Tensor:
    """The BadNets trigger on uint8 images ``[N, C, H, W]``: a white square in the lower right corner."""
    poisoned = images.clone()
    poisoned[:, :, -side:, -side:] = 255
    return poisoned


def poison(split: Split, indices: Sequence[int], args: argparse.Namespace) -> PoisonedImages:
    images, target = add_patch(split.read(indices), args.patch_size), args.attack_target
    labels = split.labels[torch.tensor(indices)].tolist()
    return PoisonedImages(len(split), indices, images, [target] * len(indices), labels)


def train_backdoored(
    model: PixelModel, train_set: Split, bd_train: PoisonedImages, data: TestData, settings: Settings, facts: DatasetFacts
) -> pd.DataFrame:
    """Train on the poisoned training set and return BB's per-epoch table."""
    compute = choose_compute(settings.device)
    images, labels = train_set.read(range(len(train_set))), train_set.labels.clone()
    rows = torch.tensor(bd_train.indices)
    images[rows], labels[rows] = bd_train.images, torch.tensor(bd_train.targets)
    history: list[tuple[Epoch | None, Metrics | None]] = []

    def after_epoch(epoch: Epoch) -> None:
        history.append((epoch, evaluate(model, data, settings.batch_size)))
        print(f"epoch {epoch.epoch + 1} of {settings.epochs}: {_headline(history[-1][1])}", flush=True)

    device = compute.device
    train(model, images.to(device), labels.to(device), settings, compute, facts=facts, after_epoch=after_epoch)
    return history_frame(history)


def _headline(metrics: Metrics | None) -> str:
    return "" if metrics is None else "  ".join(f"{k[5:]} {v:.4f}" for k, v in metrics.headline().items())


def make_record(args: argparse.Namespace) -> Path:
    """Poison, train, save. Returns the record folder, which appears whole (under a temporary name until then).

    Raises:
        UserError: the record exists already, or dataset, model or target are not usable.
    """
    folder = Path(args.record_root) / args.save_folder_name
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it or choose another --save_folder_name.")
    if not 0 < args.pratio < 1:
        raise UserError(f"--pratio is {args.pratio:g}, but must be between 0 and 1.")
    if args.dataset == "digits":
        make_digits(Path(args.dataset_path) / "digits")
    size = FACTS[args.dataset].size if args.dataset in FACTS else DIGITS_SIZE
    facts = dataset_facts(args.dataset, size)
    train_set, test_set = (open_split(args.dataset_path, args.dataset, train, size) for train in (True, False))
    num_classes = facts.num_classes or int(train_set.labels.max()) + 1
    if not 0 <= args.attack_target < num_classes:
        raise UserError(f"--attack_target {args.attack_target} is not one of the {num_classes} classes 0..{num_classes - 1}.")

    settings = Settings(
        device=args.device, random_seed=args.random_seed, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr
    )
    compute = choose_compute(settings.device)
    make_deterministic()
    chosen = random.Random(args.random_seed).sample(range(len(train_set)), int(args.pratio * len(train_set)))
    bd_train = poison(train_set, sorted(chosen), args)
    # BB leaves the target class out of the poisoned test set: those images need no backdoor to be "successful".
    bd_test = poison(test_set, torch.nonzero(test_set.labels != args.attack_target).flatten().tolist(), args)
    device = compute.device
    data = TestData(
        test_set.read(range(len(test_set))).to(device),
        test_set.labels.to(device),
        bd_test.images.to(device),
        torch.tensor(bd_test.targets, device=device),
        torch.tensor(bd_test.original, device=device),
    )
    torch.manual_seed(args.random_seed)
    network = build_model(args.model, num_classes)
    model = PixelModel(network, facts).to(device).to(memory_format=torch.channels_last)
    history = train_backdoored(model, train_set, bd_train, data, settings, facts)

    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write_csv(unfinished / "attack_df.csv", history)
    write_csv(unfinished / "attack_df_summary.csv", summary_frame(history))
    write_plots(unfinished, history)
    info = {**vars(args), "attack": "badnet", "attack_label_trans": "all2one", "num_classes": num_classes}
    info |= {"img_size": size, "terminal_info": sys.argv, "wd": settings.wd, "save_path": f"./record/{folder.name}"}
    write_torch(unfinished / "info.pickle", info)
    indicator = torch.zeros(len(train_set), dtype=torch.float64)
    indicator[torch.tensor(bd_train.indices)] = 1
    write_torch(unfinished / "train_poison_index_list.pickle", indicator.numpy())
    write_attack_record(
        unfinished,
        name=folder.name,
        model_name=args.model,
        num_classes=num_classes,
        state=network.state_dict(),
        dataset=args.dataset,
        image_size=size,
        bd_train=bd_train,
        bd_test=bd_test,
    )
    unfinished.rename(folder)
    return folder


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save_folder_name", default="badnet_digits", help="the record's name (default badnet_digits)")
    parser.add_argument("--record_root", default="./record")
    parser.add_argument("--dataset_path", default="./data")
    parser.add_argument("--dataset", default="digits", help=f"digits, {', '.join(FACTS)} or an image folder")
    parser.add_argument("--model", default="resnet18", choices=MODEL_NAMES, metavar="MODEL")
    parser.add_argument("--attack_target", type=int, default=0)
    parser.add_argument("--pratio", type=float, default=0.1, help="share of training images that get the trigger")
    parser.add_argument("--patch_size", type=int, default=5, help="pixels; BackdoorBench's CIFAR patch has 3 (default 5)")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--random_seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    try:
        folder = make_record(parse(argv))
    except UserError as error:
        print(f"make_record: {error}", file=sys.stderr)
        return 2
    print(f"record written to {folder} in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
