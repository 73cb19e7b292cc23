"""How long and at which rate an attacked model is trained: ours, and BackdoorBench's to compare. Imports no torch."""

from __future__ import annotations

from typing import Any

# BB trains 50 to 200 epochs at lr 0.01; ten times that rate, with the cosine down to 0, needs fewer. The digits are few, so
# they need small batches; unknown image folders are taken to be small too.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 12, "batch_size": 32, "lr": 0.02},
    "cifar10": {"epochs": 40, "batch_size": 128, "lr": 0.1},
    "cifar100": {"epochs": 60, "batch_size": 128, "lr": 0.1},
    "gtsrb": {"epochs": 30, "batch_size": 128, "lr": 0.05},
    "tiny": {"epochs": 60, "batch_size": 128, "lr": 0.1},
}
FOLDER_RECIPE = {"epochs": 30, "batch_size": 32, "lr": 0.02}
UNNORMALISED_LR = 0.01  # networks without batch norm diverge above; BB's own rate

# config/attack/prototype/*.yaml; batches of 128 throughout.
BB_EPOCHS = {"cifar10": 100, "cifar100": 100, "gtsrb": 50, "tiny": 200}
BB_LR = 0.01


def in_words() -> str:
    """The recipes for ``--help``, one dataset a line, BackdoorBench's beside ours."""
    lines = ["epochs, batch size and learning rate by dataset (BackdoorBench's: --epochs and --lr of the last column):"]
    for name, recipe in {**RECIPES, "a folder": FOLDER_RECIPE}.items():
        ours = f"{recipe['epochs']:3d} epochs, batch {recipe['batch_size']:3d}, lr {recipe['lr']:<5g}"
        bb = f"  BB: {BB_EPOCHS[name]} epochs, lr {BB_LR}" if name in BB_EPOCHS else ""
        lines.append(f"  {name:9s} {ours}{bb}")
    return "\n".join(lines)
