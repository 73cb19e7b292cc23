"""Training the attacked model: where it begins, and what it says of each epoch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import make_record
import pandas as pd
import pytest
import torch
from fmp_core.attacks import make_record as making
from fmp_core.attacks.train_model import TrainingSet, train_attacked_model
from fmp_core.data.datasets import dataset_facts
from fmp_core.inputs import load_inputs
from fmp_core.models.build import PixelModel
from fmp_core.models.evaluate import evaluate
from fmp_core.settings import Settings
from fmp_core.storage.checkpoint import Checkpoint
from fmp_core.system.devices import Device
from made_records import flags, make
from torch import Tensor, nn


class AlwaysOne(nn.Module):
    """Says class 1 of three, whatever the image."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.0, 9.0, 0.0]))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), 3)


def test_predictions_on_poisoned_images_are_compared_with_both_labels(tmp_path: Path) -> None:
    poisoned = torch.tensor([True] * 4 + [False] * 5)
    cross = torch.tensor([False] * 8 + [True])
    labels = torch.tensor([1, 1, 1, 1, 0, 1, 1, 1, 0])
    original = torch.tensor([0, 1, 2, 2, 0, 1, 1, 1, 0])
    data = TrainingSet(torch.zeros(9, 3, 8, 8, dtype=torch.uint8), labels, original, poisoned, cross)
    facts, cpu = dataset_facts("toys", (8, 8, 3)), torch.device("cpu")
    settings = Settings(epochs=1, lr=1e-6, amp=False)
    model = PixelModel(AlwaysOne(), facts).on(cpu)
    history = train_attacked_model(model, data, dict, settings, Device(cpu), facts, Checkpoint(tmp_path / "c.pt", {}))
    (epoch, _) = history[0]
    names = ("train_acc_clean_only", "train_asr_bd_only", "train_ra_bd_only")
    assert [epoch[name] for name in names] == [0.75, 1.0, 0.25]


def test_another_seed_begins_with_other_weights(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Tensor]] = []

    def stop(model: nn.Module, *_: Any) -> None:
        begun.append({name: value.clone() for name, value in model.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(making, "train_attacked_model", stop)
    for number, seed in enumerate("001"):
        command = flags(data, tmp_path, "--save_folder_name", f"r{number}", "--random_seed", seed)
        assert make_record.main(command) == 130
    one, same, other = begun
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one if name.endswith("weight"))


def test_the_table_ends_with_what_the_records_model_does(data: Path, tmp_path: Path) -> None:
    folder = make(data, tmp_path, "--pratio", "0.25")
    settings = Settings(record_root=str(folder.parent), dataset_path=str(data), epochs=0)
    inputs = load_inputs(settings, folder.name, torch.device("cpu"))
    found = asdict(evaluate(inputs.defender.model, inputs.test, 8).metrics)
    last = pd.read_csv(folder / "attack_df.csv", index_col=0).iloc[-1]
    assert found["test_asr"] != found["test_ra"]
    assert {name: last[name] for name in found} == pytest.approx(found, rel=1e-5)
