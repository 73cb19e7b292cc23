"""What BackdoorBench's own code makes of a record: ``check_parity`` runs this inside BackdoorBench, through ``shims.py``.

    python shims.py probe.py INPUTS.json MEASURED.json

Only BackdoorBench's functions load, transform and measure here; nothing of FMP is imported. Python 3.8 suffices.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torchvision import transforms
from utils.aggregate_block.dataset_and_transform_generate import get_transform
from utils.aggregate_block.fix_random import fix_random
from utils.aggregate_block.model_trainer_generate import generate_cls_model
from utils.choose_index import choose_index
from utils.save_load_attack import load_attack_result
from utils.trainer_cls import PureCleanModelTrainer

SETS = ("clean_train", "clean_test", "bd_train", "bd_test")
METRICS = ("clean_test_loss_avg_over_batch", "bd_test_loss_avg_over_batch", "test_acc", "test_asr", "test_ra")


def measure(model_name: str, state: dict[str, Any], data: dict[str, Any], inputs: dict[str, Any]) -> dict[str, float]:
    """BackdoorBench's figures for ``state``, strictly loaded."""
    model = generate_cls_model(model_name, inputs["num_classes"])
    model.load_state_dict(state)
    trainer = PureCleanModelTrainer(model)
    trainer.criterion, trainer.device, trainer.non_blocking = torch.nn.CrossEntropyLoss(), inputs["device"], False
    loaders = {
        key + "_dataloader": torch.utils.data.DataLoader(data[key], batch_size=inputs["batch_size"], shuffle=False)
        for key in ("clean_test", "bd_test")
    }
    return dict(zip(METRICS, trainer.test_current_model(loaders)))  # noqa: B905 - Python 3.8


def pixels_sha256(images: Iterable[Any], transform: Any) -> str:
    """SHA-256 of the uint8 pixels ``[N, C, H, W]`` that BackdoorBench's test transform makes, its normalisation undone."""
    digest = hashlib.sha256()
    for image in images:
        tensor = transform(image)
        for step in transform.transforms:
            if isinstance(step, transforms.Normalize):
                mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (step.mean, step.std))
                tensor = tensor * std + mean
        digest.update((tensor * 255).round().to(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def draw(total: int, inputs: dict[str, Any], index: str | None) -> list[int]:
    """BackdoorBench's own clean subset: positions in a clean training set of ``total`` images, in its order."""
    fix_random(inputs["seed"])
    return [int(i) for i in choose_index(argparse.Namespace(ratio=inputs["ratio"], index=index), total)]


def main() -> None:
    """Read the inputs from the file that the command line names first; write what was measured to the second."""
    with open(sys.argv[1], encoding="utf-8") as file:
        inputs = json.load(file)
    folder = "record/" + inputs["result_file"]
    data = load_attack_result(folder + "/attack_result.pt")
    clean, poisoned = data["clean_train"].wrapped_dataset, data["bd_test"].wrapped_dataset
    transform = get_transform(inputs["dataset"], *inputs["size"], train=False)
    for key in ("clean_test", "bd_test"):
        data[key].wrap_img_transform = transform
    subset = draw(len(clean), inputs, None)
    poisoned_items = [poisoned[i] for i in range(len(poisoned))]
    result = load_attack_result(folder + "/defense/fmp/defense_result.pt")  # as the scripts in analysis/ read it
    measured = {
        "sizes": {key: None if data[key] is None else len(data[key]) for key in SETS},
        "data": {
            "clean subset of the seed": subset,
            "clean subset of --index": draw(len(clean), inputs, inputs["index"]),
            "clean subset: labels": [int(clean[i][1]) for i in subset],
            "clean subset: pixels": pixels_sha256([clean[i][0] for i in subset], transform),
            "poisoned test set: attack labels": [int(item[1]) for item in poisoned_items],
            "poisoned test set: true labels": [int(item[4]) for item in poisoned_items],
            "poisoned test set: pixels": pixels_sha256([item[0] for item in poisoned_items], transform),
        },
        "attacked": measure(data["model_name"], data["model"], data, inputs),
        "defended": measure(data["model_name"], result["model"], data, inputs),
    }
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(measured, file)


main()
