"""One test per mistake of the released code (docs/method.md).

Where normalisation matters, the workplace of ``conftest.py`` is used, whose dataset is ``cifar10``.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from colours import CLASSES, EPS, MEAN, NAME, STD, metrics, run_colours, saved_weights
from fmp_core.command import main
from fmp_core.data.datasets import DatasetFacts
from fmp_core.frg.scores import layer_slices
from fmp_core.models.build import build_model
from fmp_core.models.evaluate import TestData as Data
from fmp_core.models.evaluate import evaluate
from fmp_core.models.feature_maps import trace_conv_layers
from fmp_core.models.pruning import prune_feature_maps
from fmp_core.models.training import Trainer
from fmp_core.settings import Settings
from fmp_core.system.devices import Device
from narrow_resnet import NARROW_RESNET
from PIL import Image
from reference import score
from scoring import score_feature_maps
from torch import Tensor, nn
from toy import OutOfOrder, Plain, SmallPreActResNet
from toy_cases import same, toy_case, weights


class FromPixels(nn.Module):
    """Normalisation written out here, not taken from the code under test."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network((pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1))


def assert_scores_of_the_paper(
    results: Path,
    record: Path,
    model: nn.Module,
    network: nn.Module,
    names: list[str],
    images: Tensor,
    labels: Tensor,
    **options: Any,
) -> None:
    """``feature_maps.csv`` holds, for the layers ``names``, what the paper's loop makes of ``images``, pixels in [0,1]."""
    network.load_state_dict(torch.load(record / "attack_result.pt", weights_only=False)["model"])  # our own file
    layers = [layer for layer in trace_conv_layers(network, images) if layer.name in names]
    expected = score(model.eval(), layers, images, labels, eps=EPS, **options)
    frame = pd.read_csv(results / "feature_maps.csv")
    rows = frame[frame["layer"].isin(names)]
    margins = expected.margins.mean(1).numpy()
    assert len(rows) == len(margins) == sum(layer.channels for layer in layers) and len(layers) == len(names)
    assert np.abs(rows["margin"].to_numpy() - margins).max() < 1e-3 * max(1.0, np.abs(margins).max())
    assert (rows["correct"].to_numpy() == expected.correct.numpy()).mean() > 0.98  # a margin may be 0 within rounding
    assert np.ptp(margins) > 0.01 * np.abs(margins).max()  # the comparison can fail


def image_files(root: Path, results: Path, count: int) -> tuple[Tensor, Tensor]:
    """The first images of the clean subset, as pixels in [0,1], and their labels."""
    files = sorted((root / "data" / "colours" / "train").rglob("*.png"))  # by class, then by name, as image folders count
    chosen = [files[int(line)] for line in (results / "log" / "index.txt").read_text().split()[:count]]
    images = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in chosen]).float() / 255
    return images, torch.tensor([int(file.parent.name[-1]) for file in chosen])


def test_mistake_frg_on_augmented_images(colours_run: Path, colours_template: Path) -> None:
    """The whole command's scores are those of the paper's loop on the very image files, also behind residual blocks."""
    network = build_model(NARROW_RESNET, CLASSES)
    record, names = colours_template / "record" / NAME, ["conv1", "layer1.0.conv2", "layer2.0.conv2"]
    assert_scores_of_the_paper(colours_run, record, network, network, names, *image_files(colours_template, colours_run, 2))


def test_mistake_normalised_twice_or_clamped_after_normalising(workplace: Path, run_fmp: Callable[..., Any]) -> None:
    """On cifar10, which is normalised: eps is of pixels in [0,1], and the network sees (pixels - mean) / std, once."""
    record = workplace / "record" / "badnet_tiny"
    flags = ["--frg_samples", "2", "--eps", "4/255", "--epochs", "0"]
    assert run_fmp("--result_file", record.name, *flags).code == 0
    batches = [
        pickle.loads((workplace / "data" / "cifar10" / "cifar-10-batches-py" / f"data_batch_{i}").read_bytes())
        for i in range(1, 6)
    ]
    pixels = torch.from_numpy(np.concatenate([batch["data"] for batch in batches])).view(-1, 3, 32, 32)
    labels = torch.tensor([label for batch in batches for label in batch["labels"]])
    results = record / "defense" / "fmp"
    chosen = [int(line) for line in (results / "log" / "index.txt").read_text().split()[:2]]
    network = build_model(NARROW_RESNET, 10)
    names = ["conv1", "layer2.0.conv2"]
    assert_scores_of_the_paper(
        results, record, FromPixels(network), network, names, pixels[chosen].float() / 255, labels[chosen]
    )


def test_mistake_hooked_in_forward_order_but_zeroed_in_module_order() -> None:
    """Registered backwards: map 2 of the convolution that runs first is what gets zeroed, with the batch norm it feeds."""
    model, images, labels = toy_case(OutOfOrder)
    network = model.network
    before = weights(network)
    layers = trace_conv_layers(network, images[:1])
    with torch.no_grad():  # conv_b's scores must not be mistaken for conv_a's: make map 2 of conv_a harmless
        network.conv_a.weight[2] = 0
    clean = int((model(images).argmax(1) == labels).sum())
    scores = score_feature_maps(model, layers, images, labels, eps=16 / 255)
    where = {layer.name: part for layer, part in layer_slices(scores.layers)}
    assert int(scores.correct[where["conv_a"]][2]) == clean
    network.load_state_dict(before)
    nothing = torch.zeros(6, dtype=torch.bool)
    prune_feature_maps(layers, {"conv_a": torch.arange(6) == 2, "conv_b": nothing, "shortcut": nothing})
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"conv_a.weight", "bn_a.weight", "bn_a.bias"}  # bn_b comes first among the modules


def test_mistake_batch_norm_bias_left_alive() -> None:
    model, images, _ = toy_case(Plain)
    layers = trace_conv_layers(model.network, images[:1])
    assert model.network.bn1.bias[1] != 0 and model.network.conv1.bias[1] != 0
    prune_feature_maps(layers, {"conv1": torch.arange(5) == 1, "conv2": torch.zeros(6, dtype=torch.bool)})
    found: list[Tensor] = []
    model.network.bn1.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    model(images)
    assert (found[0][:, 1] == 0).all()


def test_mistake_scores_from_one_batch_of_32() -> None:
    """Forty images are all scored: a map without effect counts all forty, and wrong labels among the last eight show."""
    model, images, labels = toy_case(Plain, count=40)
    with torch.no_grad():
        model.network.conv1.weight[0] = 0
        labels = model(images).argmax(1)
    labels[35:] = (labels[35:] + 1) % 5
    scores = score_feature_maps(model, trace_conv_layers(model.network, images[:1]), images, labels, eps=16 / 255, rows=32)
    assert scores.samples == 40
    assert int(scores.correct[0]) == 35


def test_mistake_test_images_enter_batch_norm_statistics() -> None:
    """Training with a test after every epoch ends in the same bits as training without, statistics included."""
    results = []
    black = torch.zeros(9, 3, 8, 8, dtype=torch.uint8)
    data = Data(black, torch.zeros(9).long(), black, torch.zeros(9).long(), torch.zeros(9).long())
    for tested in (True, False):
        model = toy_case(Plain)[0]
        images = torch.randint(0, 256, (10, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
        settings = Settings(epochs=3, batch_size=5, amp=False)
        trainer = Trainer(settings, Device(torch.device("cpu")), DatasetFacts(5, (8, 8, 3)))
        for _ in trainer.epochs(model, images, torch.arange(10) % 5):
            if tested:
                evaluate(model, data, 4)
        results.append(weights(model))
    assert same(*results)


def test_mistake_alpha_and_eps_missing_from_the_command_line(colours_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert {"--eps", "--alpha", "--frg_steps"} <= set(re.findall(r"--\w+", capsys.readouterr().out))
    assert metrics(colours_run)["settings"]["eps"] == pytest.approx(
        4 / 255
    )  # --eps 4/255, and the scores above are of this eps


def test_alpha_and_steps_of_the_command_line_reach_the_ranking(colours: Path) -> None:
    results = run_colours(colours, "--frg_samples", "1", "--epochs", "0", "--frg_steps", "2", "--alpha", "1/255")
    network = build_model(NARROW_RESNET, CLASSES)
    images, labels = image_files(colours, results, 1)
    record = colours / "record" / NAME
    assert_scores_of_the_paper(results, record, network, network, ["conv1"], images, labels, steps=2, alpha=1 / 255)
    with pytest.raises(AssertionError):  # another alpha has other scores
        assert_scores_of_the_paper(results, record, network, network, ["conv1"], images, labels, steps=2, alpha=2 / 255)


def test_mistake_cuda_hard_coded(colours_run: Path) -> None:
    assert metrics(colours_run)["device"].startswith("cpu")
    assert all(value.device.type == "cpu" for value in saved_weights(colours_run).values())


def test_mistake_two_full_forwards_per_feature_map() -> None:
    """Clean and noisy pass are shared: per map and image there is one full pass, the inference; the loop makes three."""
    model, images, labels = toy_case(SmallPreActResNet)
    layers = trace_conv_layers(model.network, images[:1])
    maps = sum(layer.channels for layer in layers)
    passed = [0]

    def count(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        passed[0] += len(inputs[0])

    for module in (model, model.network):
        passed[0] = 0
        handle = module.register_forward_pre_hook(count)
        score_feature_maps(model, layers, images, labels, eps=EPS, rows=len(images))
        handle.remove()
        assert maps * len(images) <= passed[0] <= (maps + 4) * len(images)
    handle = model.register_forward_pre_hook(count)
    passed[0] = 0
    score(model.eval(), layers, images, labels, eps=EPS)
    handle.remove()
    assert passed[0] == 3 * maps * len(images)
