"""Interpolation between the fine-tuned and the attacked weights, alone and at the end of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import RESULTS, Run, weights
from conftest import RECORD
from fmp_core.inversion import trigger, verdict
from fmp_core.repair.interpolation import Interpolation
from torch import nn

TUNED = ("--device", "cpu", "--result_file", RECORD, "--epochs", "2", "--batch_size", "25", "--ratio", "1", "--report", "False")


def test_weights_and_statistics_are_averages_and_counts_stay() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1))
    before = {"0.weight": torch.full((1, 1, 1, 1), 4.0), "1.running_mean": torch.tensor([8.0])}
    model.load_state_dict({**model.state_dict(), **before})
    attacked = Interpolation.towards(model, 0.25)
    moved = {"0.weight": torch.zeros(1, 1, 1, 1), "1.running_mean": torch.zeros(1), "1.num_batches_tracked": torch.tensor(7)}
    model.load_state_dict({**model.state_dict(), **moved})
    attacked.apply(model)
    found = model.state_dict()
    assert found["0.weight"].item() == 1 and found["1.running_mean"].item() == 2 and found["1.num_batches_tracked"] == 7


def test_all_of_the_way_back_lies_the_attacked_model(workplace: Path, run_fmp: Run) -> None:
    assert run_fmp(*TUNED, "--selection", "none", "--interpolate", "1").code == 0
    attacked = torch.load(workplace / "record" / RECORD / "attack_result.pt", weights_only=False)["model"]
    found = weights(workplace)
    assert all(torch.equal(found[name], attacked[name]) for name in attacked if attacked[name].is_floating_point())
    metrics = json.loads((workplace / RESULTS / "metrics.json").read_text())
    assert metrics["before"] == metrics["after"]


@pytest.mark.parametrize("masked", [True, False])
def test_masked_maps_stay_at_zero(workplace: Path, run_fmp: Run, masked: bool) -> None:
    flags = ("--selection", "random", "--p", "8", "--interpolate", "0.5", "--masked", str(masked))
    assert run_fmp(*TUNED, *flags).code == 0
    filters = [tensor for tensor in weights(workplace).values() if tensor.ndim == 4]
    zeros = sum(int((kernel.flatten(1).abs().sum(1) == 0).sum()) for kernel in filters)
    pruned = json.loads((workplace / RESULTS / "metrics.json").read_text())["pruned"]
    assert zeros == (pruned if masked else 0) and pruned > 0


def test_a_model_with_nothing_to_unlearn_is_not_led_back(
    workplace: Path, run_fmp: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the backdoor that fine-tuning may have weakened would return."""
    for name, fewer in (("STEPS", 2), ("SPARSE_BATCH", 4), ("DENSE_BATCH", 4)):
        monkeypatch.setattr(trigger, name, fewer)
    monkeypatch.setattr(verdict, "LEAST_MARGIN", 2.0)
    found = []
    for unlearn in ("0.5", "0"):
        for more in ((), ("--interpolate", "0"), ("--distill", "0")):
            strong = (*TUNED, "--preset", "strong", "--frg_samples", "1", "--unlearn", unlearn)
            assert run_fmp(*strong, *more).code == 0
            found.append(weights(workplace))
    first, *others = found
    assert all(torch.equal(value, other[name]) for other in others for name, value in first.items())
