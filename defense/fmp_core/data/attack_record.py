"""Reading attack records, as data: nothing in them is executed.

Formats: BB ``utils/save_load_attack.py`` and ``utils/bd_dataset_v2.py``; records of BB v1 hold plain ``x``/``y`` dicts.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief  # of a nested value it shows the beginning; a few bytes can hold one of endless text
from typing import Any

from torch import Tensor

from fmp_core.data.datasets import DATASET_NAME, dataset_facts
from fmp_core.data.folders import visible
from fmp_core.data.images import Size
from fmp_core.data.names import ATTACK_FILE, RECORD_DEPTH
from fmp_core.data.poisoned_set import PoisonedSet, integer, integers, read_poisoned_set
from fmp_core.errors import UserError, did_you_mean
from fmp_core.storage.files import file_digest
from fmp_core.storage.placeholders import Opaque
from fmp_core.storage.torch_file import load_torch_file

MOST_CLASSES = 1_000_000
ATTACK_KEYS = ("model_name", "num_classes", "model", "data_path", "img_size", "clean_data", "bd_train", "bd_test")
READ_KEYS = tuple(key for key in ATTACK_KEYS if key not in ("data_path", "bd_train"))  # without the keys that only BB reads


@dataclass(frozen=True)
class AttackRecord:
    """An attack record: the suspicious model and what is needed to judge it.

    ``state`` keys lack the parts ``module`` and ``_orig_mod``, with which DataParallel and ``torch.compile`` wrap modules; the
    dict may have torch's ``_metadata``. ``bd_test`` is empty where no triggered image is known. ``digest`` is the
    SHA-256 of the file.
    """

    folder: Path
    model_name: str
    num_classes: int
    state: OrderedDict[str, Tensor]
    dataset: str
    image_size: Size
    bd_test: PoisonedSet
    digest: str


def find_records(root: str | Path) -> list[str]:
    """Names of the folders below ``root`` that hold an attack record, at most RECORD_DEPTH levels deep; links are followed."""
    root, found, seen = Path(root), [], set()
    for folder, inside, files in os.walk(root, followlinks=True):
        place, real = Path(folder).relative_to(root), os.path.realpath(folder)
        is_record = ATTACK_FILE in files and bool(place.parts)
        if is_record:
            found.append(place.as_posix())
        if is_record or real in seen or len(place.parts) >= RECORD_DEPTH:
            inside.clear()  # a record holds no records, but thousands of images
        inside[:] = [name for name in inside if not name.startswith(".")]
        seen.add(real)
    return sorted(found)


def read_attack_record(
    folder: str | Path, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> AttackRecord:
    """Read ``folder/attack_result.pt`` as BB v1 or v2 wrote it. Poisoned images are located, not yet decoded.

    Images that are held in the record as normalised numbers are recognised by ``mean`` and ``std`` (``--mean`` and ``--std``),
    and by the dataset's.

    Raises UserError, naming the file and the part, if anything is missing, damaged, refused or impossible.
    """
    folder = Path(folder)
    path = folder / ATTACK_FILE
    if folder.is_file():
        of_a_model = "docs/records.md says how to make one of a model"
        advice = "name the folder that it is in" if folder.name == ATTACK_FILE else of_a_model
        raise UserError(f"{folder} is a file, but a record is a folder; {advice}.")
    if not folder.is_dir():
        meant = did_you_mean(folder.name, [path.name for path in visible(folder.parent)])
        raise UserError(f"Record folder {folder} does not exist{meant}; check --result_file and --record_root.")
    if not path.is_file():
        raise UserError(f"Record folder {folder} holds no {ATTACK_FILE}; the attack may not have ended, or this is no record.")
    content, digest = load_torch_file(path), file_digest(path)
    missing = [key for key in READ_KEYS if not isinstance(content, Mapping) or key not in content]
    if missing:
        bare = isinstance(content, Mapping) and content and all(isinstance(value, Tensor) for value in content.values())
        what = "holds weights alone; docs/records.md says how to make a record of a model" if bare else "check --result_file"
        raise UserError(f"{path} is not an attack record ({what}): it lacks {', '.join(missing)}.")
    try:
        return _attack_record(folder, content, digest, mean, std)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError, OSError) as error:
        raise UserError(f"{path} is not as BackdoorBench writes it ({type(error).__name__}: {error}).") from None


def _refuse_placeholders(content: Mapping[str, Any]) -> None:
    """An object of a class that this program does not know may stand where nobody looks, but not where data is needed."""
    needed = {key: content[key] for key in READ_KEYS}
    if isinstance(needed["bd_test"], Mapping):
        parts = ("bd_data_container", "poison_indicator", "original_index_array")
        needed |= {f"bd_test {key}": needed["bd_test"].get(key) for key in parts}
    for key, value in needed.items():
        if isinstance(value, Opaque):
            raise ValueError(f"{key} is a {value.name}, which holds no data that could be read")


def _attack_record(
    folder: Path, content: Mapping[str, Any], digest: str, mean: Sequence[float] | None, std: Sequence[float] | None
) -> AttackRecord:
    _refuse_placeholders(content)
    dataset, model_name = content["clean_data"], content["model_name"]
    if not (isinstance(dataset, str) and re.fullmatch(DATASET_NAME, dataset)):
        raise ValueError(f"clean_data is {brief(dataset)}, which names no dataset")
    if not isinstance(model_name, str):
        raise ValueError(f"model_name is {brief(model_name)}")
    num_classes = integer(content["num_classes"])
    height, width, channels = integers(content["img_size"])
    if not 2 <= num_classes <= MOST_CLASSES:
        raise ValueError(f"num_classes is {brief(num_classes)}, but must be 2 to {MOST_CLASSES}")
    if not (0 < height <= 4096 and 0 < width <= 4096 and channels in (1, 3)):
        shape = "(height, width, channels), at most 4096, 4096, and 1 or 3"
        raise ValueError(f"img_size is {brief(content['img_size'])}, but must be {shape}")
    size = (height, width, channels)
    bd_test = content["bd_test"]
    if not (bd_test is None or isinstance(bd_test, Mapping)):
        raise ValueError(f"bd_test is a {type(bd_test).__name__}")
    known = [dataset_facts(dataset, size, mean, std), dataset_facts(dataset, size)]
    scales = [(facts.mean, facts.std) for facts in known]
    poisoned = read_poisoned_set(folder, bd_test, size, scales)
    for name, labels in (("attack", poisoned.targets), ("original", poisoned.original)):
        if labels is not None and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(f"an {name} label of bd_test is outside 0..{num_classes - 1}")
    if bd_test is not None and not len(poisoned):
        raise ValueError("bd_test holds no poisoned image")
    return AttackRecord(folder, model_name, num_classes, plain_state(content["model"]), dataset, size, poisoned, digest)


def plain_state(model: Mapping[str, Any]) -> OrderedDict[str, Tensor]:
    """A state dict under names without the parts that DataParallel and ``torch.compile`` add, with torch's ``_metadata``.

    Raises ValueError: a value is no tensor, or two have the same name then.
    """
    state: OrderedDict[str, Tensor] = OrderedDict()
    for stored, value in model.items():
        key = _unwrapped(str(stored))
        if not isinstance(value, Tensor):
            raise ValueError(f"model[{key!r}] is a {type(value).__name__} that holds no numbers")
        if key in state:
            raise ValueError(f"model has two weights that are called {key} without 'module' and '_orig_mod'")
        state[key] = value
    saved = getattr(model, "_metadata", None)
    if isinstance(saved, Mapping):
        state._metadata = {_unwrapped(str(key)): value for key, value in saved.items()}  # type: ignore[attr-defined]
    return state


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in ("module", "_orig_mod"))
