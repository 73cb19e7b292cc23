"""What a defense of BackdoorBench leaves of a model, as far as its weights need undoing before they fit it."""

from __future__ import annotations

import torch
from fmp_core.backdoorbench.final_test import masks_applied
from torch.nn.utils import prune
from toy import Plain
from toy_cases import same, weights


def test_masks_of_pruning_are_applied_and_all_else_stays() -> None:
    model, images = Plain().eval(), torch.rand(2, 3, 8, 8)
    plain = {name: tensor.clone() for name, tensor in weights(model).items()}
    assert same(masks_applied(plain), plain)
    name, layer = next((name, part) for name, part in model.named_modules() if isinstance(part, torch.nn.Linear))
    mask = (torch.arange(layer.weight.numel()) % 2).view_as(layer.weight)
    prune.custom_from_mask(layer, "weight", mask)
    expected = model(images)
    found = masks_applied(model.state_dict())
    assert set(found) == set(plain) and torch.equal(found[f"{name}.weight"], plain[f"{name}.weight"] * mask)
    fresh = Plain().eval()
    fresh.load_state_dict(found)
    assert torch.equal(fresh(images), expected)
