"""A tiny but real record: four colours in noise, 8x8 pixels, an image folder, a trained narrow ResNet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from fmp_core.command import main
from fmp_core.data.datasets import DatasetFacts
from fmp_core.data.write_record import AttackedModel, PoisonedImages, write_attack_record
from fmp_core.models.build import PixelModel, build_model
from fmp_core.models.training import Trainer
from fmp_core.settings import Settings
from fmp_core.system.devices import Device
from narrow_resnet import NARROW_RESNET
from PIL import Image
from torch import Tensor

CLASSES, SIZE, NAME = 4, 8, "badnet_colours"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)  # of cifar10 in BackdoorBench
EPS = 4 / 255
FLAGS = ["--ratio", "1", "--frg_samples", "2", "--eps", "4/255", "--epochs", "1", "--batch_size", "8", "--p", "8"]
FLAGS += ["--report", "False"]


def coloured(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """uint8 images of four colours in noise, and their classes, in ascending order as image folders have them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) * 4 // count
    colours = torch.tensor([[200, 60, 60], [60, 200, 60], [60, 60, 200], [170, 170, 60]])
    noise = torch.randint(-50, 51, (count, 3, SIZE, SIZE), generator=generator)
    return (colours[labels][:, :, None, None] + noise).clamp(0, 255).to(torch.uint8), labels


def triggered(images: Tensor) -> Tensor:
    images = images.clone()
    images[:, :, -2:, -2:] = 255
    return images


def save_split(folder: Path, images: Tensor, labels: Tensor) -> None:
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        file = folder / f"class{label}" / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)


def build_colours(root: Path) -> None:
    """A narrow ResNet trained on 8x8 images of an image folder: its record and its data."""
    images, labels = coloured(32, seed=1)
    tests, test_labels = coloured(16, seed=2)
    data = root / "data" / "colours"
    save_split(data / "train", images, labels)
    save_split(data / "test", tests, test_labels)
    poisoned = [i for i in range(32) if labels[i] and i % 2]
    bd_train = PoisonedImages(32, poisoned, triggered(images[poisoned]), [0] * len(poisoned), labels[poisoned].tolist())
    victims = torch.nonzero(test_labels != 0).flatten().tolist()
    bd_test = PoisonedImages(16, victims, triggered(tests[victims]), [0] * len(victims), test_labels[victims].tolist())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_model(NARROW_RESNET, CLASSES)
    facts = DatasetFacts(CLASSES, (SIZE, SIZE, 3), crop_padding=0)
    mixed, mixed_labels = images.clone(), labels.clone()
    mixed[poisoned], mixed_labels[poisoned] = bd_train.images, 0
    settings = Settings(epochs=12, batch_size=8, lr=0.005, amp=False)
    cpu = Device(torch.device("cpu"))
    list(Trainer(settings, cpu, facts).epochs(PixelModel(network, facts), mixed, mixed_labels))
    write_attack_record(
        root / "record" / NAME,
        name=NAME,
        model=AttackedModel(NARROW_RESNET, CLASSES, network.state_dict()),
        dataset="colours",
        bd_train=bd_train,
        bd_test=bd_test,
    )


def run_colours(root: Path, *flags: str, device: str = "cpu") -> Path:
    """The whole command; returns the folder of results."""
    places = ["--record_root", str(root / "record"), "--dataset_path", str(root / "data")]
    assert main(["--result_file", NAME, "--device", device, *places, *FLAGS, *flags]) == 0
    return root / "record" / NAME / "defense" / "fmp"


def saved_weights(results: Path) -> dict[str, Tensor]:
    return torch.load(results / "defense_result.pt", weights_only=True)["model"]


def metrics(results: Path) -> dict[str, Any]:
    return json.loads((results / "metrics.json").read_text())
