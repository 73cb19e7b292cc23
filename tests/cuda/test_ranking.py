"""Ranking on CUDA: the paper's loop on the CPU, resume, memory that runs out, repeated runs, racing, every architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fmp_core.frg import scorer, scorer_state
from fmp_core.frg.racing import race
from fmp_core.frg.scores import Scores, lowest
from fmp_core.models.build import MODEL_NAMES, build_model
from fmp_core.models.feature_maps import trace_conv_layers
from fmp_core.storage.checkpoint import Checkpoint
from reference import score
from scoring import make_scorer, score_feature_maps
from torch import Tensor, nn
from toy import Plain, SmallPreActResNet, needs_cuda
from toy_cases import Normalised, toy_case

pytestmark = [pytest.mark.cuda, needs_cuda]
EPS = 16 / 255
FIELDS = ("correct", "margin", "smallest_margin")


def on_cuda(model: Normalised, images: Tensor, labels: Tensor) -> tuple[Any, ...]:
    """The arguments of a scorer on the GPU."""
    layers = trace_conv_layers(model.network, images[:1])
    return model.cuda(), layers, images.cuda(), labels.cuda()


def equal(one: Scores, other: Scores) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", [Plain, SmallPreActResNet], ids=lambda kind: kind.__name__)
def test_scores_equal_the_cpu_loop(kind: type[nn.Module], steps: int) -> None:
    model, images, labels = toy_case(kind)
    slow = score(model, trace_conv_layers(model.network, images[:1]), images, labels, eps=EPS, steps=steps)
    fast = score_feature_maps(*on_cuda(model, images, labels), eps=EPS, steps=steps)
    near = (slow.margins.abs() < 1e-2).sum(1)
    assert ((fast.correct - slow.correct).abs() <= near).all()
    torch.testing.assert_close(fast.margin, slow.margins.mean(1), rtol=1e-2, atol=1e-2)


def test_bfloat16_scores_are_close() -> None:
    case = on_cuda(*toy_case(SmallPreActResNet))
    exact, rough = (score_feature_maps(*case, eps=EPS, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert (exact.correct - rough.correct).abs().double().mean() < 1
    torch.testing.assert_close(rough.margin, exact.margin, rtol=0.1, atol=0.1)


def test_two_rankings_have_the_same_bits() -> None:
    case = on_cuda(*toy_case(SmallPreActResNet))
    assert equal(*(score_feature_maps(*case, eps=EPS) for _ in range(2)))


def test_a_ranking_killed_after_each_group_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state is saved from the GPU and read back to it."""
    monkeypatch.setattr(scorer_state, "EVERY", 0.0)
    case = on_cuda(*toy_case(Plain, count=7))
    whole = score_feature_maps(*case, eps=EPS, rows=14)

    def stops(_pairs: int) -> None:
        raise KeyboardInterrupt

    checkpoint = Checkpoint(tmp_path / "ranking.pt", {})
    with pytest.raises(KeyboardInterrupt):
        score_feature_maps(*case, eps=EPS, rows=14, checkpoint=checkpoint, progress=stops)
    saved = checkpoint.load()
    assert saved is not None and saved["groups"] == 1 and saved["part"]["margin"].device.type == "cpu"
    assert equal(score_feature_maps(*case, eps=EPS, rows=14, checkpoint=checkpoint), whole)


def test_out_of_memory_halves_the_batch_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    case, genuine, sizes = on_cuda(*toy_case(Plain, count=7)), scorer.SharedForward, list[int]()
    expected = score_feature_maps(*case, eps=EPS)

    def limited(model: Any, layers: Any, images: Tensor, start: Tensor, copies: int = 1, *more: Any) -> Any:
        sizes.append(len(images) * copies)
        if sizes[-1] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return genuine(model, layers, images, start, copies, *more)

    monkeypatch.setattr(scorer, "SharedForward", limited)
    found = score_feature_maps(*case, eps=EPS, rows=64)
    assert len(sizes) == 3 and sizes[0] > sizes[1] > 16 >= sizes[2]
    torch.testing.assert_close(found.margin, expected.margin, rtol=0, atol=1e-3)


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch")
def test_a_gpu_that_is_too_small_halves_the_batch_and_goes_on() -> None:
    """The limit lies between what a small batch and a large one take: the libraries' own share differs between GPUs."""
    case = on_cuda(*toy_case(SmallPreActResNet, count=512))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    expected = score_feature_maps(*case, eps=EPS, rows=64)
    little = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    score_feature_maps(*case, eps=EPS, rows=4096)
    much = torch.cuda.max_memory_allocated()
    assert little < much
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((little + much) / 2 / torch.cuda.get_device_properties(0).total_memory)
    try:
        found = score_feature_maps(*case, eps=EPS, rows=4096)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(found.margin, expected.margin, rtol=0, atol=1e-3)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_racing_selects_what_exact_ranking_selects(scope: str) -> None:
    ranked = make_scorer(*on_cuda(*toy_case(SmallPreActResNet, count=24)), eps=4 / 255)
    exact, raced = ranked.score(), race(ranked, 4, scope, cheap_precision=torch.float32)
    assert torch.equal(lowest(exact, 4, scope)[0], lowest(raced, 4, scope)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_model_ranks_as_on_the_cpu(name: str) -> None:
    """One map of the first, the middle and the last convolution."""
    torch.manual_seed(0)
    size = {"alexnet": 64, "inception_v3": 75}.get(name, 32)  # the least they take
    images, labels = torch.rand(2, 3, size, size), torch.arange(2)
    model = Normalised(build_model(name, 10).eval())
    layers = trace_conv_layers(model.network, images[:1])
    chosen = [layers[0], layers[len(layers) // 2], layers[-1]]
    asked = torch.cat([torch.arange(layer.channels) == (0 if layer in chosen else -1) for layer in layers])
    cpu = score_feature_maps(model, layers, images, labels, eps=8 / 255, rows=2, maps=asked)
    cuda = score_feature_maps(model.cuda(), layers, images.cuda(), labels.cuda(), eps=8 / 255, rows=2, maps=asked)
    assert int(asked.sum()) == len({layer.name for layer in chosen})
    torch.testing.assert_close(cuda.margin[asked], cpu.margin[asked], rtol=2e-2, atol=2e-2)
