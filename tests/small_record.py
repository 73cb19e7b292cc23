"""A record of four triggered 4x4 images, and changes of records."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fmp_core.data.attack_record import read_attack_record
from fmp_core.data.datasets import Split
from fmp_core.data.write_record import AttackedModel, PoisonedImages, write_attack_record
from PIL import Image

SIZE = (4, 4, 3)
TRUE = [1, 2, 3, 1]  # of the poisoned test images
AT = [1, 4, 6, 7]  # their positions in a clean test set of 8
STATE = OrderedDict(b=torch.arange(3.0), a=torch.ones(2, dtype=torch.float16), n=torch.tensor(5))
PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 4, 4), dtype=np.uint8))


def write_small_record(folder: Path) -> Path:
    """A record of four triggered 4x4 images at positions AT, attack label 0; its weights belong to no model."""
    test = PoisonedImages(8, AT, PIXELS, [0] * 4, TRUE)
    train = PoisonedImages(20, [3, 5], PIXELS[:2], [0, 0], [2, 3])
    write_attack_record(
        folder, name="mine", model=AttackedModel("resnet18", 4, STATE), dataset="toys",
        bd_train=train, bd_test=test,
    )  # fmt: skip
    return folder


Edit = Callable[[Path, Callable[[dict[str, Any]], Any]], None]


def images_in(folder: Path) -> torch.Tensor:
    return read_attack_record(folder).bd_test.pixels(SIZE)


def set_to(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of a nested dict: ``set_to("bd_test", "x", value=1)``."""

    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def rename_globals(path: Path, old: bytes, new: bytes) -> None:
    """Rewrite the pickle of a torch file; global names are newline-terminated text in it, so lengths may change."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    names = [name for name in parts if name.endswith("/data.pkl")]
    assert len(names) == 1 and old in parts[names[0]]
    parts[names[0]] = parts[names[0]].replace(old, new)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def clean_test() -> Split:
    return Split(torch.tensor([0, 1, 0, 0, 2, 0, 3, 1]), lambda indices: torch.zeros(len(indices), 3, 4, 4, dtype=torch.uint8))


def in_memory(content: dict[str, Any]) -> None:
    """What BB writes with ``save_folder_path`` None: ``(PIL image, attack label, true label)``."""
    state = content["bd_test"]
    container = state["bd_data_container"]
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in PIXELS]
    container["data_dict"] = {index: (image, 0, true) for index, image, true in zip(AT, images, TRUE, strict=True)}
    container["save_folder_path"] = state["save_folder_path"] = None
