"""The attack record and result that BackdoorBench is given: what was read of a stranger's files, written anew.

BackdoorBench executes whatever a pickle says and opens whatever path it holds. So it gets a file of plain data, whose images
lie in the record's own folders, wherever the stored paths lead. A check of the file itself would not do, since a zip file can
be made that two readers read differently. Imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fmp_core.backdoorbench.workspace import Job
from fmp_core.data.names import ATTACK_FILE
from fmp_core.data.poisoned_set import inside_record, integer
from fmp_core.errors import UserError
from fmp_core.storage.files import write_torch
from fmp_core.storage.placeholders import PickledImage
from fmp_core.storage.torch_file import load_torch_file


def write_record_copy(job: Job, file: Path) -> set[str]:
    """Write the record of ``job`` to ``file``; returns the names of the record's folders in which its images lie.

    Raises UserError: a part is not as BackdoorBench writes it.
    """
    content = load_torch_file(job.folder / ATTACK_FILE)
    if isinstance(content["bd_test"], Mapping) and "x" in content["bd_test"]:
        raise UserError(f"The record {job.name} is of BackdoorBench v1, which today's BackdoorBench cannot read.")
    try:
        sets = {name: content[name] and _plain_set(content[name], job) for name in ("bd_train", "bd_test")}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"BackdoorBench cannot use the record {job.name}: its bd_train or bd_test is not as BackdoorBench writes them "
            f"({type(error).__name__}: {error}); make the record again."
        ) from None
    facts = {"model_name": job.model_name, "num_classes": job.num_classes, "model": content["model"]}
    facts |= {"data_path": f"./data/{job.dataset}", "img_size": job.image_size, "clean_data": job.dataset}
    write_torch(file, {**facts, **sets})
    items = [item for part in sets.values() if part for item in part["bd_data_container"]["data_dict"].values()]
    inside = [item["path"].removeprefix(f"./record/{job.name}/") for item in items if isinstance(item, dict)]
    return {path.partition("/")[0] for path in inside}


def write_result_copy(result: Path, file: Path) -> None:
    """Write what ``result``, a ``defense_result.pt``, holds to ``file``. Raises UserError if that is more than plain data."""
    content = load_torch_file(result, known_only=True)
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise UserError(f"{result} holds no model; run that defense again.")
    write_torch(file, dict(content))


def _plain_set(state: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """The state of a ``prepro_cls_DatasetBD_v2``, as plain data."""
    container = state["bd_data_container"]
    below = container.get("save_folder_path")
    items = {integer(key): _plain_item(item, below, job) for key, item in container["data_dict"].items()}
    on_disk = next((item["path"] for item in items.values() if isinstance(item, dict)), None)
    folder = "/".join(on_disk.split("/")[:-2]) if on_disk else None
    return {
        "bd_data_container": {"save_folder_path": folder, "data_dict": items, "save_file_format": ".png"},
        "getitem_all": bool(state["getitem_all"]),
        "getitem_all_switch": bool(state["getitem_all_switch"]),
        "original_index_array": _numbers(state["original_index_array"]),
        "poison_indicator": _numbers(state["poison_indicator"]),
        "save_folder_path": folder,
    }


def _plain_item(item: Any, below: str | None, job: Job) -> Any:
    """One poisoned image and its labels: its path below ``./record``, or the image itself where the record holds it."""
    if isinstance(item, Mapping):
        inside = inside_record(item["path"], below, job.folder)
        return {"path": f"./record/{job.name}/{inside}", "other_info": [_value(value) for value in item["other_info"]]}
    image, *labels = item
    return (image.decode() if isinstance(image, PickledImage) else _numbers(image), *map(_value, labels))


def _numbers(values: Any) -> Any:
    """An array or tensor as it is, a list of numbers as an array."""
    return values if isinstance(values, (np.ndarray, Tensor)) else np.asarray([_value(value) for value in values])


def _value(value: Any) -> Any:
    if isinstance(value, Tensor) and not value.ndim:  # a label of CelebA
        return value.clone()
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, (int, float, str, type(None))):
        raise ValueError(f"it has a {type(value).__name__} where a label or an index belongs")
    return value
