#!/usr/bin/env python3
"""Measure FRG ranking against its bound and against the released scheme, all in one run.

    python record_scripts/bench_frg.py --against released                        # random PreActResNet18 weights, random images
    python record_scripts/bench_frg.py --result_file badnet_cifar10 --against released --csv frg.csv

Figures (images/s unless named otherwise):

* ceiling_forward, ceiling_input_grad: a plain forward pass, and forward + input gradient, of the same model in the same dtype
  at the best of several batch sizes;
* engine_map: (map, image) pairs per second of ``score_feature_maps`` on an even sample of maps over all layers; the forward
  passes that all maps share are timed apart and charged in the proportion of a full ranking;
* efficiency: time the bound N*M*(VJP_l + F) takes at those ceilings, over the time measured. VJP_l is the input gradient's cost
  times the share of multiplications up to layer l;
* released_map: the released scheme, written anew: per map two full forward passes, one backward, one inference, batch 32, fp32.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "defense"))

import pandas as pd
import torch
import torch.nn.functional as F
from fmp_core.data.attack_record import read_attack_record
from fmp_core.data.datasets import FACTS
from fmp_core.errors import UserError
from fmp_core.frg.scorer import score_feature_maps
from fmp_core.models.build import PixelModel, build_model, load_model
from fmp_core.models.evaluate import predict, to_unit
from fmp_core.models.feature_maps import ConvLayer, frozen, trace_conv_layers
from fmp_core.models.training import Trainer
from fmp_core.settings import Settings
from fmp_core.system import devices
from torch import Tensor, nn

EPS = 1 / 255
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RELEASED_BATCH = 32
TRAINING_IMAGES = {"cpu": 1024, "cuda": 10240}


def synchronised(device: torch.device) -> float:
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
    sizes = (32, 64, 256) if device.type == "cpu" else (256, 1024, 4096)
    network = copy.deepcopy(model.network).to(dtype)
    forward, both = 0.0, 0.0
    for size in sizes:
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


def released_scheme(model: nn.Module, layer: ConvLayer, channel: int, images: Tensor, labels: Tensor, start: Tensor) -> int:
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
        return int((model(reverse).argmax(1) == labels).sum())


def sample_maps(layers: list[ConvLayer], wanted: int) -> Tensor:
    """An even sample over all layers: bool ``[N]``, at least one map per layer."""
    total = sum(layer.channels for layer in layers)
    every = max(1, total // wanted)
    return torch.arange(total) % every == every // 2


def peak_memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, float]:
    device = devices.choose_device(args.device).device
    facts = FACTS["cifar10"]
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
    start = (images + EPS * (2 * torch.rand(images.shape, generator=generator).to(device) - 1)).clamp(0, 1)
    model = PixelModel(network, facts).to(device).to(memory_format=torch.channels_last)
    layers = trace_conv_layers(network.to(device), images[:1])
    total = sum(layer.channels for layer in layers)
    wanted = sample_maps(layers, args.maps)
    figures: dict[str, float] = {}
    score = partial(
        score_feature_maps, model, layers, images, labels, eps=EPS, dtype=dtype, rows=args.chunk, memory_mib=args.memory
    )
    with frozen(model):
        shared = seconds(lambda: score(wanted=torch.zeros_like(wanted)), device, 1)
        sampled = seconds(lambda: score(wanted=wanted), device, 1, warm_up=device.type == "cuda") - shared
        full = shared + sampled * total / int(wanted.sum())
        figures["engine_map_images_per_s"] = total * len(images) / full
        figures["peak_memory_mib"] = peak_memory_mib(device)
        if args.against == "released":
            plain = PixelModel(network, facts).to(device).to(memory_format=torch.contiguous_format)
            batch = [t[:RELEASED_BATCH].contiguous() for t in (images, labels, start)]
            picks = [(layer, layer.channels // 2) for layer in layers]
            times = [seconds(lambda p=p: released_scheme(plain, *p, *batch), device, 1) for p in picks]  # type: ignore[misc]
            weighted = sum(t * layer.channels for t, (layer, _) in zip(times, picks, strict=True)) / total
            figures["released_map_images_per_s"] = len(batch[0]) / weighted
            figures["ratio_vs_released"] = figures["engine_map_images_per_s"] / figures["released_map_images_per_s"]
            plain.to(memory_format=torch.channels_last)
        costs = conv_costs(model, layers, images[:1])
        forward, both = ceilings(model, dtype, images)
        figures["ceiling_forward_images_per_s"], figures["ceiling_input_grad_images_per_s"] = forward, both
        backward = 1 / both - 1 / forward
        reach = [sum(costs[: i + 1]) / sum(costs) for i in range(len(layers))]
        bound = 1 / forward + sum(backward * r * layer.channels for r, layer in zip(reach, layers, strict=True)) / total
        figures["efficiency"] = bound * figures["engine_map_images_per_s"]
    return figures


def measure_training(args: argparse.Namespace) -> dict[str, float]:
    """Images/s of fine-tuning (bf16 autocast where the device has it) and of evaluation (fp32), each against a plain loop that
    does nothing but the model's work on one ready batch."""
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


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--result_file", help="take the weights of this attack record")
    parser.add_argument("--record_root", default="./record")
    parser.add_argument("--model", default="preactresnet18", help="without --result_file: random weights of this model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--maps", type=int, default=240, help="size of the even sample of feature maps")
    parser.add_argument("--chunk", type=int, help="images per batch (default: what suits the device)")
    parser.add_argument("--memory", type=int, help="MiB that ranking may keep")
    parser.add_argument("--against", choices=["released"], help="also time the released scheme")
    parser.add_argument("--training", action="store_true", help="also measure fine-tuning and evaluation")
    parser.add_argument("--repeat", type=int, default=1, help="measure this often; the table shows the median and the range")
    parser.add_argument("--csv", type=Path, help="also write device,dtype,figure,value rows")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    rows = []
    try:
        device = devices.choose_device(args.device)
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
    except UserError as error:
        print(f"bench_frg: {error}", file=sys.stderr)
        return 2
    if args.csv:
        pd.DataFrame(rows, columns=["device", "dtype", "figure", "value"]).to_csv(args.csv, index=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
