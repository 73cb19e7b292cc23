"""Attack records and defense results as BackdoorBench writes them; each file appears whole or not at all.

Formats: BB ``utils/save_load_attack.py`` and ``utils/bd_dataset_v2.py``.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fmp_core.data.images import Size, to_pil
from fmp_core.data.names import ATTACK_FILE
from fmp_core.errors import UserError
from fmp_core.storage.files import write_torch


@dataclass(frozen=True)
class PoisonedImages:
    """What an attack made of one clean set of ``total`` images: ``images`` uint8 ``[n, C, H, W]`` at positions ``indices``."""

    total: int
    indices: Sequence[int]
    images: Tensor
    targets: Sequence[int]
    original: Sequence[int]


class AttackedModel(NamedTuple):
    """A model by the name of its architecture, the number of its classes and its weights."""

    name: str
    num_classes: int
    state: Mapping[str, Tensor]


def write_attack_record(
    folder: Path,
    *,
    name: str,
    model: AttackedModel,
    dataset: str,
    bd_train: PoisonedImages | None,
    bd_test: PoisonedImages | None,
    image_size: Size | None = None,
) -> None:
    """Write record ``name`` into ``folder`` as BB does: PNGs ``bd_*_dataset/<label>/<index>.png``, ``attack_result.pt`` last.

    ``name`` is what the stored paths say (``./record/<name>/...``), since ``folder`` may be a temporary one. ``bd_train`` is
    for BB defenses that read the training set; None if it is not known. ``bd_test`` is None if no triggered image is known:
    FMP defends such a model without ASR and RA, BB's defenses cannot. ``image_size`` (height, width, channels) is needed then.
    """
    if bd_test is not None:
        channels, height, width = bd_test.images.shape[1:]
        image_size = (height, width, channels)
    content = {
        "model_name": model.name,
        "num_classes": model.num_classes,
        "model": OrderedDict((key, value.detach().cpu()) for key, value in model.state.items()),
        "data_path": f"./data/{dataset}",
        "img_size": image_size,
        "clean_data": dataset,
        "bd_train": bd_train and _backdoor_state(folder, name, "bd_train_dataset", bd_train, keep_all=True),
        "bd_test": bd_test and _backdoor_state(folder, name, "bd_test_dataset", bd_test, keep_all=False),
    }
    if hasattr(os, "sync"):  # once for all images, which are many: attack_result.pt may not outlive them in a power cut
        os.sync()
    write_torch(folder / ATTACK_FILE, content)


def _backdoor_state(folder: Path, record: str, images: str, poisoned: PoisonedImages, keep_all: bool) -> dict[str, Any]:
    saved_below = f"./record/{record}/{images}"
    numbers = sorted({int(index) for index in poisoned.indices})
    if not len(poisoned.images) == len(poisoned.indices) == len(numbers) or (
        numbers and not 0 <= numbers[0] <= numbers[-1] < poisoned.total
    ):
        raise UserError(
            f"The poisoned images for {images} do not fit: {len(poisoned.images)} images, {len(poisoned.indices)} indices, of "
            f"which {len(numbers)} differ, and each must be one of 0..{poisoned.total - 1}."
        )
    items = {}
    for row, (index, target, label) in enumerate(zip(poisoned.indices, poisoned.targets, poisoned.original, strict=True)):
        inside = f"{int(label)}/{int(index)}.png"
        (folder / images / inside).parent.mkdir(parents=True, exist_ok=True)
        to_pil(poisoned.images[row]).save(folder / images / inside)
        items[int(index)] = {"path": f"{saved_below}/{inside}", "other_info": [int(target), int(label)]}
    indicator = np.zeros(poisoned.total)
    indicator[list(items)] = 1
    return {
        "bd_data_container": {"save_folder_path": saved_below, "data_dict": items, "save_file_format": ".png"},
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": np.arange(poisoned.total) if keep_all else np.array(sorted(items), dtype=np.int64),
        "poison_indicator": indicator,
        "save_folder_path": saved_below,
    }


def write_defense_result(path: Path, model_name: str, num_classes: int, state: Mapping[str, Tensor]) -> None:
    """Write ``defense_result.pt``: BB's three keys, CPU tensors (BB ``save_defense_result``)."""
    model = OrderedDict((key, value.detach().cpu()) for key, value in state.items())
    write_torch(path, {"model_name": model_name, "num_classes": num_classes, "model": model})
