"""BackdoorBench attack records in (safely), attack records and defense results out (atomically).

Formats: BB ``utils/save_load_attack.py`` and ``utils/bd_dataset_v2.py``; records of BB v1 hold plain ``x``/``y`` dicts.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from reprlib import repr as brief  # of a nested value it shows the beginning; a few bytes can hold one of endless text
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fmp_core.data.datasets import Split
from fmp_core.data.images import Size, read_images, room_for, to_pixels
from fmp_core.errors import UserError
from fmp_core.storage.files import sync_disks, write_torch
from fmp_core.storage.torch_file import PickledImage, load_torch_file

ATTACK_FILE = "attack_result.pt"
MOST_CLASSES = 1_000_000
ATTACK_KEYS = ("model_name", "num_classes", "model", "data_path", "img_size", "clean_data", "bd_train", "bd_test")


@dataclass(frozen=True)
class PoisonedSet:
    """Triggered test images.

    ``images`` are files, or uint8 ``[N, C, H, W]`` where the record held them in memory. ``targets`` are the attacker's
    labels and ``original`` the true ones (both int64 ``[N]``); ``original`` is None where a v1 record does not say and
    ``indices`` (positions in the clean test set, int64 ``[N]``) has to answer.
    """

    images: list[Path] | Tensor
    targets: Tensor
    original: Tensor | None
    indices: Tensor | None

    def __len__(self) -> int:
        return len(self.targets)

    def pixels(self, size: Size) -> Tensor:
        """uint8 ``[N, C, H, W]``. Raises UserError if a file cannot be decoded."""
        return self.images if isinstance(self.images, Tensor) else read_images(self.images, size)

    def true_labels(self, clean_test: Split) -> Tensor:
        """The true labels, int64 ``[N]``. Raises UserError if the record does not determine them."""
        if self.indices is not None and not ((self.indices >= 0) & (self.indices < len(clean_test))).all():
            raise UserError(
                f"The record names poisoned test images {int(self.indices.min())} to {int(self.indices.max())}, but the clean "
                f"test set has images 0..{len(clean_test) - 1}; check --dataset_path."
            )
        if self.original is not None:
            return self.original
        if self.indices is None:
            raise UserError("The record names neither the true labels nor the test images it poisoned, so RA is undefined.")
        return clean_test.labels[self.indices]


@dataclass(frozen=True)
class AttackRecord:
    """An attack record: the suspicious model and what is needed to judge it. ``state`` keys have no ``module.`` prefix."""

    folder: Path
    model_name: str
    num_classes: int
    state: OrderedDict[str, Tensor]
    dataset: str
    image_size: Size
    bd_test: PoisonedSet


def find_records(root: str | Path) -> list[str]:
    """Names of the folders below ``root`` that hold an attack record."""
    return sorted(path.parent.relative_to(root).as_posix() for path in Path(root).glob(f"*/{ATTACK_FILE}"))


def read_attack_record(folder: str | Path) -> AttackRecord:
    """Read ``folder/attack_result.pt`` as BB v1 or v2 wrote it. Poisoned images are located, not yet decoded.

    Raises:
        UserError: anything is missing, damaged, refused or impossible; names the file and the part.
    """
    folder = Path(folder)
    path = folder / ATTACK_FILE
    if not folder.is_dir():
        raise UserError(f"Record folder {folder} does not exist; check --result_file and --record_root.")
    if not path.is_file():
        raise UserError(f"Record folder {folder} holds no {ATTACK_FILE}; the attack may not have ended, or this is no record.")
    content = load_torch_file(path)
    missing = [key for key in ATTACK_KEYS if not isinstance(content, Mapping) or key not in content]
    if missing:
        raise UserError(f"{path} is not an attack record: it lacks {', '.join(missing)}.")
    try:
        return _attack_record(folder, content)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError, OSError) as error:
        raise UserError(f"{path} is not as BackdoorBench writes it ({type(error).__name__}: {error}).") from None


def _attack_record(folder: Path, content: Mapping[str, Any]) -> AttackRecord:
    dataset, model_name = content["clean_data"], content["model_name"]
    if not (isinstance(dataset, str) and re.fullmatch(r"\w[\w.-]*", dataset)):
        raise ValueError(f"clean_data is {brief(dataset)}, which names no dataset")
    if not isinstance(model_name, str):
        raise ValueError(f"model_name is {brief(model_name)}")
    num_classes = int(content["num_classes"])
    height, width, channels = (int(n) for n in content["img_size"])
    if not 2 <= num_classes <= MOST_CLASSES or not (0 < height <= 4096 and 0 < width <= 4096 and channels in (1, 3)):
        raise ValueError(f"num_classes is {brief(num_classes)} and img_size {brief(content['img_size'])}")
    size = (height, width, channels)
    bd_test = content["bd_test"]
    if not isinstance(bd_test, Mapping):
        raise ValueError(f"bd_test is a {type(bd_test).__name__}")
    poisoned = _v1_poisoned_set(bd_test, size) if "x" in bd_test else _poisoned_set(folder, bd_test, size)
    for name, labels in (("attack", poisoned.targets), ("original", poisoned.original)):
        if labels is not None and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(f"an {name} label of bd_test is outside 0..{num_classes - 1}")
    if not len(poisoned):
        raise ValueError("bd_test holds no poisoned image")
    return AttackRecord(folder, model_name, num_classes, _state(content["model"]), dataset, size, poisoned)


def _state(model: Mapping[str, Any]) -> OrderedDict[str, Tensor]:
    state = OrderedDict((str(key).removeprefix("module."), value) for key, value in model.items())
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"model[{key!r}] is a {type(value).__name__} that holds no numbers")
    return state


def _poisoned_set(folder: Path, state: Mapping[str, Any], size: Size) -> PoisonedSet:
    """The state of BB's ``prepro_cls_DatasetBD_v2``; positions whose indicator is 0 are clean and left out."""
    container = state["bd_data_container"]
    indicator, order = _integers(state["poison_indicator"]), _integers(state["original_index_array"])
    if order and not 0 <= min(order) <= max(order) < len(indicator):
        raise ValueError(f"bd_test has an original index outside 0..{len(indicator) - 1}")
    items = {int(key): value for key, value in container["data_dict"].items()}
    chosen = [i for i in order if indicator[i]]
    absent = next((i for i in chosen if i not in items), None)
    if absent is not None:
        raise ValueError(f"bd_test has no entry for poisoned image {absent}")
    on_disk = all(isinstance(items[i], Mapping) for i in chosen)
    labels = [items[i]["other_info"] if on_disk else items[i][1:] for i in chosen]
    images: list[Path] | Tensor
    if on_disk:
        images = _locate([items[i]["path"] for i in chosen], container.get("save_folder_path"), folder)
    else:
        images = _stack([items[i][0] for i in chosen], size)
    return PoisonedSet(images, _int64([x[0] for x in labels]), _int64([x[1] for x in labels]), _int64(chosen))


def _v1_poisoned_set(state: Mapping[str, Any], size: Size) -> PoisonedSet:
    x = state["x"]
    if isinstance(x, Tensor) and x.is_floating_point():
        if not x.isfinite().all():
            raise ValueError("bd_test x holds NaN or infinite numbers")
        images = (x * 255).round().clamp(0, 255).to(torch.uint8)
    else:
        images = _stack(list(x), size)
    if images.shape[1:] != (size[2], *size[:2]) or len(images) != len(state["y"]):
        raise ValueError(f"bd_test x has shape {tuple(images.shape)} for {len(state['y'])} labels")
    original, indices = state.get("original_targets"), state.get("original_index")
    for name, values in (("original_targets", original), ("original_index", indices)):
        if values is not None and len(values) != len(images):
            raise ValueError(f"bd_test {name} has {len(values)} entries for {len(images)} images")
    return PoisonedSet(
        images,
        _int64(state["y"]),
        None if original is None else _int64(original),
        None if indices is None else _int64(indices),
    )


def _int64(values: Any) -> Tensor:
    return torch.tensor(_integers(values), dtype=torch.int64)


def _integers(values: Any) -> list[int]:
    """Flat integers. Nested lists can be endless (a few lists that hold each other), so numpy is not asked to unfold them."""
    if isinstance(values, (Tensor, np.ndarray)) and values.ndim != 1:
        raise ValueError(f"indices or labels of shape {tuple(values.shape)}")
    return [int(value) for value in values]


def _stack(images: Sequence[Any], size: Size) -> Tensor:
    """Images held in the record (pickled PIL, uint8 arrays ``[H, W, C]``) as uint8 ``[N, C, H, W]``."""
    pixels = room_for(len(images), size)
    for row, image in enumerate(images):
        pixels[row] = to_pixels(image.decode() if isinstance(image, PickledImage) else Image.fromarray(_bytes(image)), size)
    return pixels


def _bytes(image: Any) -> np.ndarray:
    if not isinstance(image, (Tensor, np.ndarray)):
        raise ValueError(f"an image of bd_test is a {type(image).__name__}")
    array = np.asarray(image)
    if np.issubdtype(array.dtype, np.floating):
        array = (array * 255).round().clip(0, 255)
    return array.astype(np.uint8)


def _locate(stored: Sequence[str], saved_below: str | None, folder: Path) -> list[Path]:
    """Files of poisoned images, inside the record folder wherever that lies now.

    BB stores paths relative to the working directory of the attack (``./record/<name>/bd_test_dataset/<label>/<i>.png``), which
    break when the record is moved or renamed. Only the part from the image folder on is used; it may not leave the record.
    """
    root = folder.resolve()
    base = PurePosixPath(saved_below.replace("\\", "/")) if saved_below else None
    found = []
    for text in stored:
        path = PurePosixPath(text.replace("\\", "/"))
        inside = (
            PurePosixPath(base.name) / path.relative_to(base)
            if base and path.is_relative_to(base)
            else PurePosixPath(*path.parts[-3:])
        )
        file = root / inside
        if not file.resolve().is_relative_to(root):
            raise UserError(f"The record in {folder} names an image outside its folder ({text}), and was refused.")
        found.append(file)
    missing = [file for file in found if not file.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(found)} poisoned test images are missing, first {missing[0]}; copy the whole record."
        )
    return found


@dataclass(frozen=True)
class PoisonedImages:
    """What an attack made of one clean set of ``total`` images: ``images`` uint8 ``[n, C, H, W]`` at positions ``indices``."""

    total: int
    indices: Sequence[int]
    images: Tensor
    targets: Sequence[int]
    original: Sequence[int]


def write_attack_record(
    folder: Path,
    *,
    name: str,
    model_name: str,
    num_classes: int,
    state: Mapping[str, Tensor],
    dataset: str,
    image_size: Size,
    bd_train: PoisonedImages,
    bd_test: PoisonedImages,
) -> None:
    """Write record ``name`` into ``folder`` as BB does: PNGs ``bd_*_dataset/<label>/<index>.png``, ``attack_result.pt`` last.

    ``name`` is what the stored paths say (``./record/<name>/...``), since ``folder`` may be a temporary one.
    """
    content = {
        "model_name": model_name,
        "num_classes": num_classes,
        "model": OrderedDict((key, value.detach().cpu()) for key, value in state.items()),
        "data_path": f"./data/{dataset}",
        "img_size": image_size,
        "clean_data": dataset,
        "bd_train": _backdoor_state(folder, name, "bd_train_dataset", bd_train, keep_all=True),
        "bd_test": _backdoor_state(folder, name, "bd_test_dataset", bd_test, keep_all=False),
    }
    sync_disks()  # once for all images, which are many: attack_result.pt may not outlive them in a power cut
    write_torch(folder / ATTACK_FILE, content)


def _backdoor_state(folder: Path, record: str, images: str, poisoned: PoisonedImages, keep_all: bool) -> dict[str, Any]:
    saved_below = f"./record/{record}/{images}"
    items = {}
    for row, (index, target, label) in enumerate(zip(poisoned.indices, poisoned.targets, poisoned.original, strict=True)):
        inside = f"{int(label)}/{int(index)}.png"
        (folder / images / inside).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(poisoned.images[row].permute(1, 2, 0).squeeze(-1).numpy()).save(folder / images / inside)
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
