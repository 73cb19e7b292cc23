"""Records that tests make with the command, of 24 + 9 random images in 3 classes."""

from __future__ import annotations

from pathlib import Path

import make_record
import numpy as np
from dataset_files import save_image
from PIL import Image

CLASSES, TRAIN, TEST = 3, 24, 9


def write_toys(root: Path) -> None:
    """``root/toys``: an image folder of 32x32 images; beside it a folder ``gtsrb`` and a trigger file that do not fit."""
    rng = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("test", TEST)):
        for index in range(count):
            file = root / "toys" / split / f"class{index % CLASSES}" / f"{index:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    for split in ("Train", "Test"):
        save_image(root / "gtsrb" / split / "43" / "a.png", 0)
    with open(root / "several.npy", "wb") as archive:
        np.savez(archive, a=np.ones(2), b=np.ones(2))


def flags(data: Path, root: Path, *more: str) -> list[str]:
    where = ["--dataset_path", str(data), "--record_root", str(root / "record"), "--dataset", "toys", "--device", "cpu"]
    return [*where, "--model", "squeezenet1_0", "--epochs", "2", "--batch_size", "8", "--amp", "False", *more]


def make(data: Path, root: Path, *more: str) -> Path:
    assert make_record.main(flags(data, root, "--save_folder_name", "mine", *more)) == 0
    return root / "record" / "mine"
