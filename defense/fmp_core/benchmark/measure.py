"""Measuring FRG ranking, fine-tuning and testing, for ``record_scripts/bench_frg.py``, which describes the figures.

Own timing rather than ``torch.utils.benchmark``: that runs what it times at least three times, and a ranking takes minutes.
"""

from __future__ import annotations

import copy
import math
import resource
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmp_core.benchmark.operations import EPS, RELEASED_BATCH, operations_per_map
from fmp_core.data.attack_record import read_attack_record
from fmp_core.data.datasets import FACTS
from fmp_core.errors import UserError, in_one_line
from fmp_core.frg.reverse import FrgSettings
from fmp_core.frg.scorer import Batching, FeatureMapScorer
from fmp_core.models.build import PixelModel, build_model, load_model
from fmp_core.models.evaluate import predict, to_unit
from fmp_core.models.feature_maps import ConvLayer, frozen, trace_conv_layers
from fmp_core.models.training import Trainer
from fmp_core.settings import Settings
from fmp_core.system import devices

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CEILING_BATCHES = {"cpu": (32, 64, 256), "cuda": (256, 1024, 4096)}
TRAINING_IMAGES = {"cpu": 1024, "cuda": 10240}


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 3, warm_up: bool = True) -> float:
    """Median seconds of ``work`` until the device has done it, after one unmeasured call with ``warm_up``."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    if warm_up:
        work()
    times = []
    for _ in range(repeats):
        started = now()
        work()
        times.append(now() - started)
    return statistics.median(times)


@contextmanager
def outputs_of(layers: Sequence[ConvLayer]) -> Iterator[list[Tensor]]:
    """The list to which every call of one of ``layers`` in the block appends its output."""
    outputs: list[Tensor] = []
    handles = [layer.module.register_forward_hook(lambda _module, _inputs, out: outputs.append(out)) for layer in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def ceilings(model: PixelModel, dtype: torch.dtype, images: Tensor) -> list[float]:
    """Images/s of a plain forward pass and of forward + input gradient, each at its best batch size."""
    network = copy.deepcopy(model.network).to(dtype)

    def forward(batch: Tensor) -> None:
        with torch.inference_mode():
            network(batch)

    def with_gradient(batch: Tensor) -> None:
        leaf = batch.clone().requires_grad_()
        torch.autograd.grad(network(leaf).float().square().sum(), leaf)

    def speed(work: Callable[[Tensor], None], size: int) -> float:
        batch = images.repeat(-(-size // len(images)), 1, 1, 1)[:size].to(dtype, memory_format=torch.channels_last)
        try:
            return size / seconds(partial(work, batch), images.device)
        except (RuntimeError, MemoryError) as error:
            if size == sizes[0] or not devices.is_out_of_memory(error):
                raise
            return 0.0  # a smaller batch is the best one then

    sizes = CEILING_BATCHES[images.device.type]
    return [max(speed(work, size) for size in sizes) for work in (forward, with_gradient)]


def released_scheme(model: nn.Module, layer: ConvLayer, channel: int, images: Tensor, labels: Tensor, start: Tensor) -> Tensor:
    """One feature map, one batch, as the released code spends it: 3 forward passes and one backward."""
    noisy = start.clone().requires_grad_()
    with outputs_of([layer]) as outputs:
        model(images)
        model(noisy)
    loss = F.mse_loss(outputs[1][:, channel], outputs[0][:, channel])
    (gradient,) = torch.autograd.grad(loss, noisy)
    reverse = (images + EPS * gradient.sign()).clamp(0, 1)
    with torch.no_grad():
        return (model(reverse).argmax(1) == labels).sum()


def _network(args: Namespace) -> tuple[nn.Module, tuple[int, int, int], int]:
    """What is measured: the model, the height, width and channels of its images, and how many classes it has."""
    if args.result_file and args.model:
        raise UserError("--model and --result_file do not go together: the record names its model.")
    if args.result_file:
        record = read_attack_record(Path(args.record_root) / args.result_file)
        return load_model(record.model_name, record.num_classes, record.state), record.image_size, record.num_classes
    torch.manual_seed(0)
    return build_model(args.model or "preactresnet18", 10), FACTS["cifar10"].size, 10


def make_scorer(args: Namespace, dtype: torch.dtype) -> FeatureMapScorer:
    """A scorer of the record ``--result_file``, or of random weights of ``--model``, on random images with random labels."""
    device = devices.choose_device(args.device).device
    network, (height, width, channels), classes = _network(args)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(args.images, channels, height, width, generator=generator)
    images = images.to(device, memory_format=torch.channels_last)
    labels = torch.randint(classes, (args.images,), generator=generator).to(device)
    model = PixelModel(network, FACTS["cifar10"]).on(device)
    try:
        layers = trace_conv_layers(network, images[:1])
    except RuntimeError as error:
        if devices.is_out_of_memory(error):
            raise
        name = args.model or args.result_file
        raise UserError(f"{name} cannot take images of {height}x{width} ({in_one_line(error)}); choose another.") from None
    return FeatureMapScorer(model, layers, images, labels, FrgSettings(EPS), dtype, Batching(args.chunk, args.memory))


def measure(args: Namespace, dtype: torch.dtype) -> dict[str, float]:
    """The figures of ranking, by name."""
    scorer = make_scorer(args, dtype)
    model, layers, images, total = scorer.model, scorer.layers, scorer.images, scorer.total
    assert isinstance(model, PixelModel)
    device, cuda = images.device, images.device.type == "cuda"
    every = max(1, total // args.maps)
    sample = torch.arange(total) % every == every // 2  # even over all layers
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with frozen(model):
        shared = seconds(scorer.forward_passes, device, 1) * math.ceil(len(images) / scorer.rows)
        sampled = seconds(lambda: scorer.score(sample), device, 1, warm_up=cuda) - shared
        ranked = total * len(images) / (shared + sampled * total / int(sample.sum()))
        process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        memory = torch.cuda.max_memory_allocated(device) / 2**20 if cuda else process
        figures = {"engine_map_images_per_s": ranked, "peak_memory_mib": memory}
        if args.against == "released":
            released = _measure_released(scorer)
            figures |= {"released_map_images_per_s": released, "ratio_vs_released": ranked / released}
        if args.operations:
            counted = operations_per_map(model, images[:1], len(images), released_scheme)
            figures |= {f"{name}_operations_per_map": number for name, number in counted.items()}
        with devices.exact_convolutions():  # as ranking computes
            forward, both = ceilings(model, dtype, images)
        figures |= {"ceiling_forward_images_per_s": forward, "ceiling_input_grad_images_per_s": both}
        with outputs_of(layers) as outputs, torch.no_grad():
            model(images[:1])
    costs = [float(out[0, 0].numel() * layer.module.weight.numel()) for layer, out in zip(layers, outputs, strict=True)]
    gradients = (sum(costs[: i + 1]) / sum(costs) * layer.channels for i, layer in enumerate(layers))
    figures["efficiency"] = ranked * (1 / forward + (1 / both - 1 / forward) * sum(gradients) / total)
    return figures


def _measure_released(scorer: FeatureMapScorer) -> float:
    """(map, image) pairs per second of the released scheme: one map of each layer, weighted with the layer's channels."""
    batch = [tensor[:RELEASED_BATCH].contiguous() for tensor in (scorer.images, scorer.labels, scorer.start)]
    scorer.model.to(memory_format=torch.contiguous_format)
    spent = 0.0
    for layer in scorer.layers:
        run = partial(released_scheme, scorer.model, layer, layer.channels // 2, *batch)
        spent += layer.channels * seconds(run, scorer.device, 1)
    scorer.model.to(memory_format=torch.channels_last)
    return len(batch[0]) * scorer.total / spent


def measure_training(args: Namespace) -> dict[str, float]:
    """Images/s of fine-tuning (bf16 autocast where the device has it in hardware) and of testing (fp32).

    The efficiencies compare them with a plain loop that does nothing but the model's work on one ready batch.
    """
    chosen, settings = devices.choose_device(args.device), Settings(epochs=1)
    device, facts = chosen.device, FACTS["cifar10"]
    count = TRAINING_IMAGES[device.type]
    generator = torch.Generator().manual_seed(0)
    network, (height, width, channels), classes = _network(args)
    images = torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8).to(device)
    labels = torch.randint(classes, (count,), generator=generator).to(device)
    model = PixelModel(network, facts).on(device)
    batch = to_unit(images[: settings.batch_size]).contiguous(memory_format=torch.channels_last)
    tested = batch[: devices.rows_per_batch(device)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    bfloat16 = devices.has_fast_bfloat16(device)

    def plain_step() -> None:
        model.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = F.cross_entropy(model(batch), labels[: len(batch)])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def plain_forward() -> None:
        with torch.inference_mode():
            model.eval()(tested)

    def fine_tune() -> None:
        list(Trainer(settings, chosen, facts).epochs(model, images, labels))

    def test() -> None:
        predict(model, images, labels, settings.batch_size)

    def speed(work: Callable[[], None], images: int) -> float:
        return images / seconds(work, device)

    step, tuning = speed(plain_step, len(batch)), speed(fine_tune, count)
    forward, testing = speed(plain_forward, len(tested)), speed(test, count)
    return {
        "finetune_images_per_s": tuning,
        "finetune_efficiency": tuning / step,
        "evaluate_images_per_s": testing,
        "evaluate_efficiency": testing / forward,
    }


def measure_all(args: Namespace) -> pd.DataFrame:
    """Measure and print what ``args`` (the flags of bench_frg.py) ask for. Returns device, dtype, figure and value."""
    for name in ("images", "maps", "repeat", "chunk", "memory"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}, but must be at least 1.")
    if args.csv and not args.csv.absolute().parent.is_dir():
        raise UserError(f"--csv {args.csv} cannot be written: there is no folder {args.csv.parent}.")
    device, rows = devices.choose_device(args.device), []
    print(f"{device.name}, torch {torch.__version__}, {args.images} images, about {args.maps} maps, {args.repeat} run(s)")
    work: dict[str, Callable[[], dict[str, float]]] = {name: partial(measure, args, DTYPES[name]) for name in args.dtype}
    if args.training:
        work["amp"] = partial(measure_training, args)
    for dtype, once in work.items():
        for figure, runs in pd.DataFrame([once() for _ in range(args.repeat)]).items():
            rows.append((str(device.device), dtype, figure, runs.median()))
            spread = f"  ({runs.min():.2f} .. {runs.max():.2f})" if args.repeat > 1 else ""
            print(f"{dtype:6}{figure:34}{runs.median():12.2f}{spread}", flush=True)
    return pd.DataFrame(rows, columns=["device", "dtype", "figure", "value"])
