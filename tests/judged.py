"""A clean model of the colours as a user has one: weights in a file, and what judge_model.py is asked about it."""

from __future__ import annotations

import judge_model
import torch
from colours import CLASSES, SIZE, coloured
from fmp_core.data.datasets import DatasetFacts
from fmp_core.models.build import PixelModel, build_model
from fmp_core.models.training import Trainer
from fmp_core.settings import Settings
from fmp_core.system.devices import Device
from narrow_resnet import NARROW_RESNET

CPU = Device(torch.device("cpu"))


def trained(facts: DatasetFacts) -> dict[str, torch.Tensor]:
    """Weights of a clean model of the colours that normalises as ``facts`` say."""
    images, labels = coloured(32, seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_model(NARROW_RESNET, CLASSES)
    settings = Settings(epochs=30, batch_size=8, lr=0.02, amp=False)
    list(Trainer(settings, CPU, facts).epochs(PixelModel(network, facts), images, labels))
    return network.state_dict()


def run(*flags: str, model: str = "model.pth") -> int:
    """The exit code of judge_model.py in the current folder."""
    size = ["--image_size", str(SIZE), "--device", "cpu", "--dtype", "fp32"]
    return judge_model.main([model, "--model", NARROW_RESNET, "--dataset", "data/colours", *size, *flags])
