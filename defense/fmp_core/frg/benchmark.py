"""Measuring FRG ranking, fine-tuning and testing, for ``record_scripts/bench_frg.py``, which describes the figures.

Own timing rather than ``torch.utils.benchmark``: that runs what it times at least three times, and a ranking takes minutes.
"""

from __future__ import annotations

import copy
import resource
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmp_core.data.attack_record import read_attack_record
from fmp_core.data.datasets import FACTS
from fmp_core.frg.operations import RELEASED_BATCH, operations_per_map
from fmp_core.frg.reverse import FrgSettings
from fmp_core.frg.scorer import Batching, FeatureMapScorer
from fmp_core.models.build import PixelModel, build_model, load_model
from fmp_core.models.evaluate import predict, to_unit
from fmp_core.models.feature_maps import ConvLayer, frozen, trace_conv_layers
from fmp_core.models.training import Trainer
from fmp_core.settings import Settings
from fmp_core.system import devices

EPS = 1 / 255
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CEILING_BATCHES = {"cpu": (32, 64, 256), "cuda": (256, 1024, 4096)}
TRAINING_IMAGES = {"cpu": 1024, "cuda": 10240}


def synchronised(device: torch.device) -> float:
    """The time, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 3, warm_up: bool = True) -> float:
    """Median seconds of ``work``, after one unmeasured call with ``warm_up``."""
    if warm_up:
        work()
    times = []
    for _ in range(repeats):
        started = synchronised(device)
        work()
        times.append(synchronised(device) - started)
    return statistics.median(times)


def ceilings(model: PixelModel, dtype: torch.dtype, images: Tensor) -> tuple[float, float]:
    """Images/s of a plain forward pass and of forward + input gradient, each at its best batch size."""
    device = images.device
    network = copy.deepcopy(model.network).to(dtype)
    forward, both = 0.0, 0.0
    for size in CEILING_BATCHES[device.type]:
        batch = images.repeat(-(-size // len(images)), 1, 1, 1)[:size].to(dtype).contiguous(memory_format=torch.channels_last)

        def plain(batch: Tensor = batch) -> None:
            with torch.inference_mode():
                network(batch)

        def with_gradient(batch: Tensor = batch) -> None:
            leaf = batch.clone().requires_grad_()
            torch.autograd.grad(network(leaf).float().square().sum(), leaf)

        forward = max(forward, size / seconds(plain, device))
        both = max(both, size / seconds(with_gradient, device))
    return forward, both


def conv_costs(model: nn.Module, layers: list[ConvLayer], image: Tensor) -> list[float]:
    """Multiplications of each layer for one image, in execution order."""
    costs = []
    handles = []
    try:
        for layer in layers:

            def note(module: nn.Module, _inputs: object, output: Tensor) -> None:
                assert isinstance(module, nn.Conv2d)
                costs.append(output[0, 0].numel() * float(module.weight.numel()))

            handles.append(layer.module.register_forward_hook(note))
        with torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return costs


def released_scheme(model: nn.Module, layer: ConvLayer, channel: int, images: Tensor, labels: Tensor, start: Tensor) -> Tensor:
    """One feature map, one batch, as the released code spends it: 3 forward passes and one backward."""
    kept: list[Tensor] = []
    handle = layer.module.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    try:
        noisy = start.clone().requires_grad_()
        model(images)
        model(noisy)
    finally:
        handle.remove()
    loss = F.mse_loss(kept[1][:, channel], kept[0][:, channel])
    (gradient,) = torch.autograd.grad(loss, noisy)
    reverse = (images + EPS * gradient.sign()).clamp(0, 1)
    with torch.no_grad():
        return (model(reverse).argmax(1) == labels).sum()


def sample_maps(layers: list[ConvLayer], count: int) -> Tensor:
    """An even sample over all layers: bool ``[N]``, at least one map per layer."""
    total = sum(layer.channels for layer in layers)
    every = max(1, total // count)
    return torch.arange(total) % every == every // 2


def peak_memory_mib(device: torch.device) -> float:
    """Of the GPU; without one, of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@dataclass(frozen=True)
class Subject:
    """What is ranked: a model that takes pixels in [0,1], its convolutions, and random images ``[M, C, H, W]`` with labels."""

    model: PixelModel
    layers: list[ConvLayer]
    images: Tensor
    labels: Tensor

    @staticmethod
    def of(args: Namespace) -> Subject:
        """The model of the record ``--result_file``, or random weights of ``--model``. Raises UserError: no such record."""
        device, facts = devices.choose_device(args.device).device, FACTS["cifar10"]
        if args.result_file:
            record = read_attack_record(Path(args.record_root) / args.result_file)
            network = load_model(record.model_name, record.num_classes, record.state)
            height, width, channels = record.image_size
        else:
            torch.manual_seed(0)
            network = build_model(args.model, 10)
            height, width, channels = facts.size
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(args.images, channels, height, width, generator=generator).to(device)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.randint(10, (args.images,), generator=generator).to(device)
        model = PixelModel(network, facts).to(device).to(memory_format=torch.channels_last)
        return Subject(model, trace_conv_layers(network, images[:1]), images, labels)

    @property
    def total(self) -> int:
        return sum(layer.channels for layer in self.layers)


def measure(args: Namespace, dtype: torch.dtype) -> dict[str, float]:
    """The figures of ranking, by name. Raises UserError: no such record or device."""
    subject = Subject.of(args)
    with frozen(subject.model):
        figures = _measure_ranking(subject, dtype, Batching(args.chunk, args.memory), args.maps)
        ranked = figures["engine_map_images_per_s"]
        if args.against == "released":
            figures["released_map_images_per_s"] = _measure_released(subject)
            figures["ratio_vs_released"] = ranked / figures["released_map_images_per_s"]
        if args.operations:
            counted = operations_per_map(subject.model, subject.images[:1], len(subject.images), released_scheme)
            figures |= {f"{name}_operations_per_map": number for name, number in counted.items()}
        forward, both = ceilings(subject.model, dtype, subject.images)
        figures["ceiling_forward_images_per_s"], figures["ceiling_input_grad_images_per_s"] = forward, both
        costs = conv_costs(subject.model, subject.layers, subject.images[:1])
        gradients = (sum(costs[: i + 1]) / sum(costs) * layer.channels for i, layer in enumerate(subject.layers))
        figures["efficiency"] = ranked * (1 / forward + (1 / both - 1 / forward) * sum(gradients) / subject.total)
    return figures


def _measure_ranking(subject: Subject, dtype: torch.dtype, batching: Batching, maps: int) -> dict[str, float]:
    settings = FrgSettings(EPS)
    scorer = FeatureMapScorer(subject.model, subject.layers, subject.images, subject.labels, settings, dtype, batching)
    device, sample = subject.images.device, sample_maps(subject.layers, maps)
    shared = seconds(lambda: scorer.score(torch.zeros_like(sample)), device, 1)
    sampled = seconds(lambda: scorer.score(sample), device, 1, warm_up=device.type == "cuda") - shared
    full = shared + sampled * subject.total / int(sample.sum())
    return {
        "engine_map_images_per_s": subject.total * len(subject.images) / full,
        "peak_memory_mib": peak_memory_mib(device),
    }


def _measure_released(subject: Subject) -> float:
    """(map, image) pairs per second of the released scheme: one map of each layer, weighted with the layer's channels."""
    images, labels = (tensor[:RELEASED_BATCH].contiguous() for tensor in (subject.images, subject.labels))
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).to(images.device)
    start = (images + EPS * (2 * noise - 1)).clamp(0, 1)
    subject.model.to(memory_format=torch.contiguous_format)
    spent = 0.0
    for layer in subject.layers:
        channel = layer.channels // 2
        run = partial(released_scheme, subject.model, layer, channel, images, labels, start)
        spent += layer.channels * seconds(run, images.device, 1)
    subject.model.to(memory_format=torch.channels_last)
    return len(images) * subject.total / spent


def measure_training(args: Namespace) -> dict[str, float]:
    """Images/s of fine-tuning (bf16 autocast where the device has it in hardware) and of testing (fp32).

    The efficiencies compare them with a plain loop that does nothing but the model's work on one ready batch.
    """
    chosen = devices.choose_device(args.device)
    device, settings = chosen.device, Settings(epochs=1)
    count = TRAINING_IMAGES[device.type]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8).to(device)
    labels = torch.randint(10, (count,), generator=generator).to(device)
    torch.manual_seed(0)
    model = PixelModel(build_model(args.model, 10), FACTS["cifar10"]).to(device).to(memory_format=torch.channels_last)
    batch = to_unit(images[: settings.batch_size]).contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    bfloat16 = devices.has_fast_bfloat16(device)

    def plain_step() -> None:
        model.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = F.cross_entropy(model(batch), labels[: len(batch)])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def fine_tune() -> None:
        list(Trainer(settings, chosen, FACTS["cifar10"]).epochs(model, images, labels))

    rows = devices.rows_per_batch(device)

    def plain_forward() -> None:
        with torch.inference_mode():
            model.eval()(batch[:rows])

    step, tuned = seconds(plain_step, device) / len(batch), seconds(fine_tune, device) / count
    forward = seconds(plain_forward, device) / len(batch[:rows])
    tested = seconds(lambda: predict(model, images, labels, settings.batch_size), device) / count
    return {
        "finetune_images_per_s": 1 / tuned,
        "finetune_efficiency": step / tuned,
        "evaluate_images_per_s": 1 / tested,
        "evaluate_efficiency": forward / tested,
    }


def measure_all(args: Namespace) -> list[tuple[str, str, str, float]]:
    """Measure and print what ``args`` (the flags of bench_frg.py) ask for. Returns (device, dtype, figure, value) rows.

    Raises:
        UserError: no such record or device.
    """
    device, rows = devices.choose_device(args.device), []
    print(f"{device.name}, torch {torch.__version__}, {args.images} images, about {args.maps} maps, {args.repeat} run(s)")
    work: dict[str, Callable[[], dict[str, float]]] = {name: partial(measure, args, DTYPES[name]) for name in args.dtype}
    if args.training:
        work["amp"] = partial(measure_training, args)
    for dtype, once in work.items():
        runs = [once() for _ in range(args.repeat)]
        for figure in runs[0]:
            values = [run[figure] for run in runs]
            rows.append((str(device.device), dtype, figure, statistics.median(values)))
            spread = f"  ({min(values):.2f} .. {max(values):.2f})" if args.repeat > 1 else ""
            print(f"{dtype:6}{figure:34}{rows[-1][3]:12.2f}{spread}", flush=True)
    return rows
