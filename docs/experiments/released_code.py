"""The ranking, pruning and fine-tuning of the released code, on a record that FMP defends, too (docs/results.md, F33).

    git clone https://github.com/retsuh-bqw/FMP released
    python docs/experiments/released_code.py released/defense/fgsm-feature.py rows.csv --result_file badnet_gtsrb

That script reads records of BackdoorBench 1 and needs a GPU. So its functions alone are run, unchanged: on the model and the
clean subset that FMP reads, images transformed as BackdoorBench does for training, on any device. Its settings file was not
released; eps, its start noise (``alpha``) and the epochs are the paper's. Other flags are FMP's. The result is tested as FMP
tests, on all images and in evaluation mode, and becomes a row of the csv file.
"""

from __future__ import annotations

import argparse
import ast
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "defense"))

from fmp_core.data.datasets import DatasetFacts
from fmp_core.inputs import Inputs, load_inputs
from fmp_core.metrics import in_percent
from fmp_core.models.evaluate import evaluate
from fmp_core.settings import Settings, add_arguments, load_settings
from fmp_core.system.devices import choose_device

PARTS = {"Norm_layer", "dynamiccluster", "ranking", "obtain_adv_dataset", "initialize", "train"}  # of the released script


class Transformed(Dataset[tuple[Tensor, Tensor]]):
    """uint8 images ``[N, C, H, W]`` as BackdoorBench gives them to a model: cropped and flipped for training, normalised."""

    def __init__(self, images: Tensor, labels: Tensor, facts: DatasetFacts, train: bool):
        self.images, self.labels = images.cpu(), labels.cpu()
        moves = [
            v2.RandomCrop(images.shape[2:], padding=facts.crop_padding),
            v2.RandomHorizontalFlip(0.5 if facts.flip else 0.0),
        ]
        to_model = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(facts.mean, facts.std)]
        self.transform = v2.Compose([*moves, *to_model] if train else to_model)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[row]), self.labels[row]


def released(script: Path, **names: Any) -> dict[str, Any]:
    """The released script's functions, with the global ``names`` they use."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    tree.body = [part for part in tree.body if getattr(part, "name", None) in PARTS]
    names |= {"torch": torch, "nn": nn, "F": F, "np": np, "tqdm": tqdm}
    exec(compile(tree, str(script), "exec"), names)
    return names


def repair(script: Path, inputs: Inputs, settings: Settings, device: torch.device) -> None:
    """Rank, prune and fine-tune the attacked model in place."""
    defender, facts, test = inputs.defender, inputs.defender.facts, inputs.test
    args = argparse.Namespace(
        dataset="cifar10" if inputs.record.dataset == "cifar10" else "gtsrb",  # it does the same for all datasets that it knows
        eps=settings.eps,
        alpha=settings.eps,
        epochs=settings.epochs,
        device=device,
    )
    functions = released(script, args=args, get_dataset_mean_std=lambda _: (facts.mean, facts.std))
    torch.manual_seed(settings.random_seed)
    clean = Transformed(defender.images, defender.labels, facts, train=True)
    clean_test = Transformed(test.clean_images, test.clean_labels, facts, train=False)
    loaders = [DataLoader(images, settings.batch_size, shuffle=True) for images in (clean, clean_test)]
    network = defender.model.network.eval()  # as it is there after a first test
    ranks, _ = functions["obtain_adv_dataset"](network, clean)
    functions["train"](network, *loaders, ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, help="defense/fgsm-feature.py of the released code")
    parser.add_argument("csv", type=Path, help="where to add a row")
    add_arguments(parser)
    args = vars(parser.parse_args())
    script, table = args.pop("script"), args.pop("csv")
    settings = load_settings(args)
    if settings.result_file is None:
        parser.error("--result_file is needed")
    device = choose_device(settings.device).device
    for kind in (Tensor, nn.Module):
        kind.cuda = lambda self, *_: self.to(device)  # type: ignore[method-assign]
    inputs = load_inputs(settings, settings.result_file, device)
    model, test, started = inputs.defender.model, inputs.test, time.monotonic()
    print("before:", in_percent(evaluate(model, test, settings.batch_size).metrics.headline()))
    repair(script, inputs, settings, device)
    found = evaluate(model, test, settings.batch_size).metrics.headline()
    print("after:", in_percent(found))
    row = {"record": settings.result_file, "attack_result": inputs.record.digest[:8], "seed": settings.random_seed, **found}
    row |= {"seconds": round(time.monotonic() - started), "torch": torch.__version__}
    pd.DataFrame([row]).to_csv(table, mode="a", header=not table.exists(), index=False)


if __name__ == "__main__":
    main()
