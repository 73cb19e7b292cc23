"""Pictures of feature maps; a map of one pixel is shown as two numbers."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from fmp_core.models.feature_maps import trace_conv_layers
from fmp_core.report.data import Trigger
from fmp_core.report.pictures import pictures
from made_runs import made_run, scored_maps
from PIL import Image
from reference import score
from torch import nn
from toy import Plain


def size_of(uri: str) -> tuple[int, int]:
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))).size


def test_each_layer_has_a_card_and_a_map_of_one_pixel_two_numbers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(6, 5)
    ).eval()
    clean = torch.randint(0, 200, (3, 3, 8, 8), dtype=torch.uint8)
    poisoned = clean.clone()
    poisoned[:, :, -2:, -2:] = 255
    layers = trace_conv_layers(model, clean[:1] / 255)
    first, second = layers
    maps = scored_maps({first.name: [3, 1, 2, 4], second.name: [4, 4, 0, 4, 4, 4]}, samples=4)
    run = made_run(maps.assign(pruned=maps["correct"] < 2), settings={"p": 4, "frg_steps": 2})
    tac = torch.tensor([0.1, 0.9, 0.2, 0.3, 1, 2, 3, 4, 5, 6], dtype=torch.float64)
    found = pictures(run, Trigger(model, layers, clean, poisoned, torch.tensor([2, 0, 1]), tac))  # type: ignore[arg-type]
    ranks = [(card["layer"], card["channel"], card["tac_rank"]) for card in found["pruned"]]
    assert ranks == [(second.name, 2, 4), (first.name, 1, 1)]
    assert [(card["channel"], card["pruned"], card["of"]) for card in found["changed"]] == [(1, True, 4), (5, False, 6)]
    one, eight = found["pruned"]
    assert [size_of(uri) for uri in eight["activations"]] == [(8, 8), (8, 8)] and one["activations"] is None
    with torch.no_grad():
        outputs = second.module(torch.relu(first.module(torch.stack([clean[0], poisoned[0]]) / 255)))[:, 2].flatten()
    assert outputs.min() < 0  # a ReLU that works in place leaves no such number
    assert [float(number) for number in one["numbers"]] == pytest.approx(outputs.tolist(), rel=1e-2)
    assert size_of(one["noise"]) == size_of(found["example"]["change"]) == (8, 8) and found["example"]["label"] == 2


def pixels_of(uri: str) -> torch.Tensor:
    """int64 ``[C, H, W]``."""
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).long()


def test_a_card_shows_how_frg_changes_the_image_for_its_own_map() -> None:
    torch.manual_seed(0)
    model, image, eps = Plain().eval(), torch.randint(0, 200, (1, 3, 8, 8), dtype=torch.uint8), 0.05
    layers = trace_conv_layers(model, image / 255)
    first, second = layers
    maps = scored_maps({first.name: [4, 4, 1, 4, 4], second.name: [4, 4, 4, 4, 4, 0]}, samples=4)
    run = made_run(maps.assign(pruned=maps["correct"] < 2), settings={"p": 4, "eps": eps})
    tac = torch.tensor([0, 1, 2, 3, 9, 0, 1, 2, 9, 3, 4], dtype=torch.float64)
    label = torch.tensor([2])
    found = pictures(run, Trigger(model, layers, image, image.flip(3), label, tac))  # type: ignore[arg-type]
    cards = {(card["layer"], card["channel"]): card for row in ("pruned", "changed") for card in found[row]}
    assert set(cards) == {(first.name, 2), (first.name, 4), (second.name, 5), (second.name, 3)}
    made = score(model, layers, image / 255, label, eps=eps).images[:, 0]
    for place, card in cards.items():
        (number,) = maps.index[(maps["layer"] == place[0]) & (maps["channel"] == place[1])]
        change = (made[number] - image[0] / 255) / eps
        expected = (255 * (0.5 + 0.5 * change)).round()
        near = (pixels_of(card["noise"]) - expected).abs() <= 1  # a gradient near 0 may have either sign
        assert near.float().mean() > 0.97, place
