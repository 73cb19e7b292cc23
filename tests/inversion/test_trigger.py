"""Inverted triggers: the bounds of their families, and their files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fmp_core.errors import UserError
from fmp_core.inversion.trigger import (
    FAMILIES,
    SPARSE_PART,
    WARPS,
    invert_trigger,
    load_trigger,
    logits_of,
    save_trigger,
)
from fmp_core.inversion.warp import warped
from planted import (
    WHITE,
    a_trigger,
    trigger_search,
)
from torch import Tensor, nn


@pytest.mark.parametrize("family", FAMILIES)
def test_triggers_stay_within_their_family(family: str):
    found = trigger_search(WHITE)
    trigger = found.triggers([family], 1)[0]
    again = found.triggers([family], 1)[0]
    assert torch.equal(trigger.values, again.values) and torch.equal(trigger.where, again.where)
    images = found.images[:20] / 255
    changed = trigger.apply(images) - images
    assert trigger.apply(images).min() >= 0 and trigger.apply(images).max() <= 1
    if family == "sparse":
        assert trigger.where.sum() <= 16 * 16 // SPARSE_PART and set(trigger.values.unique().tolist()) <= {0.0, 1.0}
        assert not changed[(~trigger.where).expand_as(changed)].any()
    elif family in WARPS:
        assert trigger.values.shape == (1, 2, 16, 16) and 0 < trigger.values.abs().max() <= 1.5 * FAMILIES[family]
    else:
        assert 0 < changed.abs().max() <= FAMILIES[family] + 1e-6


@pytest.mark.parametrize(("side", "bound"), [(13, 13 / 32), (16, 0.5), (28, 28 / 32), (34, 1.0), (64, 1.0)])
def test_a_warp_moves_small_images_less(side: int, bound: float):
    """At most 1/32 of their side, and a pixel at most; that is the bound of the control points, a third of the side apart."""
    images = torch.randint(0, 256, (8, 3, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * (side - 2) ** 2, 3))
    network.requires_grad_(False)
    trigger = invert_trigger(network, torch.float32, (images, torch.zeros(8, dtype=torch.int64)), "warp-1", 1, seed=0)
    control = trigger.values[..., :: (side - 1) // 3, :: (side - 1) // 3]
    assert control.shape[2:] == (4, 4)
    assert float(control.abs().max()) == pytest.approx(bound, abs=1e-5)


@pytest.mark.parametrize("family", ["sparse", "warp-1"])
def test_a_trigger_file_is_read_back_or_refused(tmp_path: Path, family: str):
    path = tmp_path / "reversed_trigger.pt"
    trigger = a_trigger(family, 1.0)
    save_trigger(path, trigger)
    again = load_trigger(path, (3, 16, 16))
    assert torch.equal(again.values, trigger.values) and torch.equal(again.where, trigger.where)
    assert (again.family, again.target) == (family, 1)
    with pytest.raises(UserError, match="3x32x32"):
        load_trigger(path, (3, 32, 32))
    torch.save({"family": "sparse"}, path)
    with pytest.raises(UserError, match="run the defense again"):
        load_trigger(path, (3, 16, 16))


@pytest.mark.parametrize(("family", "drawn"), [("dense-8", [32] * 4), ("warp-1", [8] * 16)])
def test_a_quick_trigger_takes_an_eighth(family: str, drawn: list[int]):
    seen: list[int] = []
    network = nn.Sequential(nn.Flatten(), nn.Linear(768, 3)).requires_grad_(False)
    network.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    clean = torch.randint(0, 256, (8, 3, 16, 16)).to(torch.uint8), torch.zeros(8, dtype=torch.int64)
    invert_trigger(network, torch.float32, clean, family, 1, 0, quick=True)
    assert seen == drawn
    network[1].bias[0] = 1000.0  # no trigger flips anything: the first, without a pixel, is the one
    assert not invert_trigger(network, torch.float32, clean, "sparse", 1, 0).where.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_for_half_a_batch_gives_the_same_trigger(family: str):
    """Gradients are each image's own, and summed over the whole batch as before."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 3)).double().requires_grad_(False)
    clean = torch.randint(0, 256, (40, 3, 16, 16)).to(torch.uint8), torch.arange(40) % 3
    room = 1000

    def limited(_module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        if len(inputs[0]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inputs[0].double()  # one batch size rounds as another does

    network.register_forward_pre_hook(limited)
    whole = invert_trigger(network, torch.float32, clean, family, 1, seed=0)
    before = logits_of(network, torch.float32, clean[0], whole)
    room = 20
    halves = invert_trigger(network, torch.float32, clean, family, 1, seed=0)
    torch.testing.assert_close(halves.values, whole.values, rtol=0, atol=1e-6)
    assert torch.equal(halves.where, whole.where)
    torch.testing.assert_close(logits_of(network, torch.float32, clean[0], whole), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("side", [8, 24, 32, 36, 40, 45, 48, 60, 64])
def test_a_sparse_trigger_may_have_a_64th_of_the_pixels(side: int, quick: bool):
    """Also where that is no multiple of the steps: here predictions flip once so many pixels are white, and no sooner."""
    most, grey = side * side // SPARSE_PART, 100
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, 2)).requires_grad_(False)
    network[1].weight[0] = 0.0
    network[1].weight[1] = 1.0
    network[1].bias[0] = 3 * (side * side * grey + (most - 0.5) * (255 - grey)) / 255
    network[1].bias[1] = 0.0
    clean = torch.full((8, 3, side, side), grey, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)
    found = invert_trigger(network, torch.float32, clean, "sparse", 1, 0, quick)
    assert int(found.where.sum()) == most
    assert bool((logits_of(network, torch.float32, clean[0], found).argmax(1) == 1).all())


def test_what_a_warp_brings_in_from_outside_is_the_border():
    images, right = torch.rand(2, 3, 5, 7), torch.zeros(1, 2, 5, 7)
    right[:, 0] = 1
    torch.testing.assert_close(warped(images, right), torch.cat([images[..., 1:], images[..., -1:]], 3), rtol=0, atol=1e-5)
    down = torch.cat([images[:, :, 1:], images[:, :, -1:]], 2)
    torch.testing.assert_close(warped(images, right.flip(1)), down, rtol=0, atol=1e-5)
