"""DESIGN.md: the invariants of section 4 on the whole command, and one test per mistake of the released code (section 3).

The record here is tiny but real: a narrow ResNet trained on 8x8 images of an image folder. Where normalisation matters, the
workplace of ``conftest.py`` is used, whose dataset is ``cifar10``.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fmp
import numpy as np
import pandas as pd
import pytest
import torch
from fmp_core.command import main
from fmp_core.data.datasets import DatasetFacts
from fmp_core.data.write_record import PoisonedImages, write_attack_record
from fmp_core.frg.scores import layer_slices
from fmp_core.inversion import trigger, verdict
from fmp_core.models.build import PixelModel, build_model
from fmp_core.models.evaluate import TestData as Data
from fmp_core.models.evaluate import evaluate
from fmp_core.models.feature_maps import trace_conv_layers
from fmp_core.models.pruning import prune_feature_maps
from fmp_core.models.training import Trainer
from fmp_core.settings import Settings
from fmp_core.system.devices import Device
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import score
from scoring import score_feature_maps
from torch import Tensor, nn
from toy import (
    NARROW_RESNET,
    NARROW_RESNET_MAPS,
    OutOfOrder,
    Plain,
    SmallPreActResNet,
    footprint,
    same,
    toy_case,
    weights,
)

CLASSES, SIZE, NAME = 4, 8, "badnet_colours"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)  # of cifar10 in BackdoorBench
EPS = 4 / 255
FLAGS = ["--ratio", "1", "--frg_samples", "2", "--eps", "4/255", "--epochs", "1", "--batch_size", "8", "--p", "8"]
FLAGS += ["--report", "False"]
FLAGS += ["--amp", "False"]  # torch's bfloat16 weight gradients are not reproducible where a map is one pixel


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


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
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
        model_name=NARROW_RESNET,
        num_classes=CLASSES,
        state=network.state_dict(),
        dataset="colours",
        bd_train=bd_train,
        bd_test=bd_test,
    )
    return root


def run(root: Path, *flags: str, device: str = "cpu") -> Path:
    """The whole command; returns the folder of results."""
    places = ["--record_root", str(root / "record"), "--dataset_path", str(root / "data")]
    assert main(["--result_file", NAME, "--device", device, *places, *FLAGS, *flags]) == 0
    return root / "record" / NAME / "defense" / "fmp"


def saved_weights(results: Path) -> dict[str, Tensor]:
    return torch.load(results / "defense_result.pt", weights_only=True)["model"]


def metrics(results: Path) -> dict[str, Any]:
    return json.loads((results / "metrics.json").read_text())


@pytest.fixture(scope="module")
def base(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one run."""
    root = tmp_path_factory.mktemp("base") / "here"
    shutil.copytree(template, root)
    return run(root)


@pytest.fixture
def fresh(template: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(template, tmp_path / "here")
    yield tmp_path / "here"


# --- invariants ---------------------------------------------------------------------------------------------------------------


def test_replaced_poisoned_images_change_no_weight(base: Path, fresh: Path) -> None:
    files = sorted((fresh / "record" / NAME / "bd_test_dataset").rglob("*.png"))
    assert len(files) == 12
    generator = np.random.default_rng(0)
    for file in files:
        Image.fromarray(generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(file)
    other = run(fresh)
    assert same(saved_weights(base), saved_weights(other))
    assert (base / "feature_maps.csv").read_bytes() == (other / "feature_maps.csv").read_bytes()
    losses = [pd.read_csv(folder / "fmp_df.csv")["bd_test_loss_avg_over_batch"][0] for folder in (base, other)]
    assert losses[0] != losses[1]  # they really were other images


def test_shuffled_poisoned_images_of_other_targets_change_no_weight(base: Path, fresh: Path) -> None:
    path = fresh / "record" / NAME / "attack_result.pt"
    content = torch.load(path, weights_only=False)  # our own file
    bd_test = content["bd_test"]
    bd_test["original_index_array"] = bd_test["original_index_array"][::-1].copy()
    for item in bd_test["bd_data_container"]["data_dict"].values():
        label = item["other_info"][1]
        item["other_info"] = [label % 3 + 1, label]  # another target; the true labels are checked
    torch.save(content, path)
    other = run(fresh)
    assert same(saved_weights(base), saved_weights(other))
    assert metrics(base)["after"]["test_acc"] == metrics(other)["after"]["test_acc"]
    assert metrics(base)["before"] != metrics(other)["before"]  # they really had other targets


@pytest.mark.slow
@settings(max_examples=int(os.environ.get("FMP_EXAMPLES", "20")), deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), chunk=st.sampled_from([8, 32, 64]), other=st.integers(0, 2**32 - 1))
def test_any_poisoned_test_set_gives_the_same_weights(template: Path, seed: int, chunk: int, other: int) -> None:
    """Hypothesis draws the seed; the second run has another poisoned test set, another chunk, and tests less often."""
    flags = ["--random_seed", str(seed), "--frg_samples", "1", "--epochs", "2", "--p", "8"]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(template, Path(folder) / "one")
        shutil.copytree(template, Path(folder) / "two")
        draw = np.random.default_rng(other)
        path = Path(folder) / "two" / "record" / NAME / "attack_result.pt"
        content = torch.load(path, weights_only=False)  # our own file
        bd_test = content["bd_test"]
        victims = bd_test["original_index_array"]
        bd_test["original_index_array"] = draw.permutation(victims)[: draw.integers(1, len(victims) + 1)]
        for item in bd_test["bd_data_container"]["data_dict"].values():
            item["other_info"][0] = int(draw.integers(0, CLASSES))
        torch.save(content, path)
        for file in (path.parent / "bd_test_dataset").rglob("*.png"):
            Image.fromarray(draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(file)
        one = run(Path(folder) / "one", *flags)
        two = run(Path(folder) / "two", *flags, "--chunk", str(chunk), "--frequency_test", "0")
        assert same(saved_weights(one), saved_weights(two))
        assert (one / "feature_maps.csv").read_bytes() == (two / "feature_maps.csv").read_bytes()
        assert metrics(one)["before"]["test_acc"] == metrics(two)["before"]["test_acc"]


def test_strong_reads_no_poisoned_image_and_goes_on_where_it_stopped(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in one go; then with other poisoned images, stopped after the first epoch and started again: the same bits."""
    monkeypatch.setattr(verdict, "LEAST_MARGIN", -1.0)  # whatever the model, a trigger is reversed and unlearnt
    monkeypatch.setattr(verdict, "LEAST_HELD_OUT", 0)
    for name, fewer in (("STEPS", 4), ("SPARSE_BATCH", 16), ("DENSE_BATCH", 16)):
        monkeypatch.setattr(trigger, name, fewer)
    flags = ["--preset", "strong", "--dtype", "fp32", "--epochs", "2", "--frequency_test", "0"]
    results = run(fresh, *flags)
    kept = {name: (results / name).read_bytes() for name in ("feature_maps.csv", "reversed_trigger.pt")}
    weights_kept = saved_weights(results)
    shutil.rmtree(fresh / "record" / NAME / "defense")
    for file in (fresh / "record" / NAME / "bd_test_dataset").rglob("*.png"):
        Image.new("RGB", (SIZE, SIZE)).save(file)
    whole_test = fmp.FMP.evaluate

    def stopped(self: fmp.FMP, when: str) -> object:
        if when.startswith("epoch"):
            raise KeyboardInterrupt
        return whole_test(self, when)

    monkeypatch.setattr(fmp.FMP, "evaluate", stopped)
    places = ["--record_root", str(fresh / "record"), "--dataset_path", str(fresh / "data")]
    assert main(["--result_file", NAME, "--device", "cpu", *places, *FLAGS, *flags]) == 130
    assert not (results / "defense_result.pt").exists()
    monkeypatch.setattr(fmp.FMP, "evaluate", whole_test)
    results = run(fresh, *flags)
    assert same(weights_kept, saved_weights(results))
    assert kept == {name: (results / name).read_bytes() for name in kept}


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(12)), batch=st.integers(1, 13))
def test_order_and_batches_of_the_test_sets_change_no_rate(order: list[int], batch: int) -> None:
    model, images, labels = toy_case(Plain, count=12)
    pixels, targets, true = (images * 255).to(torch.uint8), (labels + 1) % 3, labels
    first = evaluate(model, Data(pixels, labels, pixels, targets, true), 5).metrics
    second = evaluate(model, Data(pixels[order], labels[order], pixels[order], targets[order], true[order]), batch).metrics
    assert first.headline() == second.headline()


def test_testing_more_or_less_often_changes_no_weight(fresh: Path) -> None:
    """Two epochs, tested after each or after the last only; and another chunk of ranking. The seed decides alone."""
    flags = ["--epochs", "2", "--frg_samples", "1"]
    results = run(fresh, *flags)
    often, table = saved_weights(results), (results / "feature_maps.csv").read_bytes()
    shutil.rmtree(fresh / "record" / NAME / "defense")
    results = run(fresh, *flags, "--frequency_test", "0", "--chunk", "40")
    assert same(often, saved_weights(results))
    assert (results / "feature_maps.csv").read_bytes() == table
    assert pd.read_csv(results / "fmp_df.csv")["test_acc"].isna().tolist() == [True, False]  # it really was tested less
    assert not same(often, saved_weights(run(fresh, *flags, "--random_seed", "1")))


def test_pruned_maps_of_the_report_are_zero_in_the_result(base: Path, template: Path, tmp_path: Path) -> None:
    shutil.copytree(base.parents[3], tmp_path / "again")  # with what a former run left: its scores are used again
    results = run(tmp_path / "again", "--epochs", "0")
    before = torch.load(template / "record" / NAME / "attack_result.pt", weights_only=False)["model"]
    after = saved_weights(results)
    frame = pd.read_csv(results / "feature_maps.csv")
    assert int(frame["pruned"].sum()) == sum(size // 8 for size in NARROW_RESNET_MAPS.values()) == metrics(results)["pruned"]
    expected = {key: value.clone() for key, value in before.items()}
    for layer, rows in frame.groupby("layer"):
        chosen = torch.tensor(rows["channel"][rows["pruned"]].to_numpy())
        # layer1.0.conv2 is followed by layer1.0.bn2, layer2.0.downsample.0 by layer2.0.downsample.1
        norm = re.sub(r"conv(\d)$", r"bn\1", str(layer)) if "conv" in str(layer) else re.sub("0$", "1", str(layer))
        for key in (f"{layer}.weight", f"{norm}.weight", f"{norm}.bias"):
            expected[key][chosen] = 0
    assert same(after, expected)


def test_evaluation_leaves_nothing_behind_after_an_exception() -> None:
    model = toy_case(Plain)[0].train()
    before = footprint(model)
    wrong = torch.zeros(2, 7, 8, 8).byte()  # 7 channels: the first convolution raises
    with pytest.raises(RuntimeError):
        evaluate(model, Data(wrong, torch.zeros(2).long(), wrong, torch.zeros(2).long(), torch.zeros(2).long()), 4)
    assert footprint(model) == before and not torch.is_inference_mode_enabled()


# --- mistakes of the released code --------------------------------------------------------------------------------------------


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


def test_mistake_frg_on_augmented_images(base: Path, template: Path) -> None:
    """The whole command's scores are those of the paper's loop on the very image files, also behind residual blocks."""
    network = build_model(NARROW_RESNET, CLASSES)
    record, names = template / "record" / NAME, ["conv1", "layer1.0.conv2", "layer2.0.conv2"]
    assert_scores_of_the_paper(base, record, network, network, names, *image_files(template, base, 2))


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


def test_mistake_alpha_and_eps_missing_from_the_command_line(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert {"--eps", "--alpha", "--frg_steps"} <= set(re.findall(r"--\w+", capsys.readouterr().out))
    assert metrics(base)["settings"]["eps"] == pytest.approx(4 / 255)  # --eps 4/255, and the scores above are of this eps


def test_alpha_and_steps_of_the_command_line_reach_the_ranking(fresh: Path) -> None:
    results = run(fresh, "--frg_samples", "1", "--epochs", "0", "--frg_steps", "2", "--alpha", "1/255")
    network = build_model(NARROW_RESNET, CLASSES)
    images, labels = image_files(fresh, results, 1)
    record = fresh / "record" / NAME
    assert_scores_of_the_paper(results, record, network, network, ["conv1"], images, labels, steps=2, alpha=1 / 255)
    with pytest.raises(AssertionError):  # another alpha has other scores
        assert_scores_of_the_paper(results, record, network, network, ["conv1"], images, labels, steps=2, alpha=2 / 255)


def test_mistake_cuda_hard_coded(base: Path) -> None:
    assert metrics(base)["device"].startswith("cpu")
    assert all(value.device.type == "cpu" for value in saved_weights(base).values())
    sources = list(Path(fmp.__file__).parent.rglob("*.py"))
    assert len(sources) > 10
    for source in sources:
        assert ".cuda()" not in source.read_text(), source


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
