"""Interrupted training ends with the bits of an uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fmp_core.data.datasets import DatasetFacts
from fmp_core.errors import UserError
from fmp_core.models.training import Epoch, Trainer
from fmp_core.settings import Settings
from fmp_core.storage.checkpoint import Checkpoint
from fmp_core.system.devices import Device
from torch import nn
from toy import Plain
from toy_cases import same, toy_case, weights

FACTS = DatasetFacts(5, (8, 8, 3), flip=True, crop_padding=2)
EPOCHS, BATCHES = 4, 3


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def dies_at(batch: int) -> Callable[..., None]:
    left = [batch]

    def on_batch(*_batch: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    return on_batch


def run(checkpoint: Checkpoint | None, on_batch: Callable[..., None] | None = None, **changes: object):
    """Train a net with batch norm and dropout for 4 epochs of 3 batches; returns its weights and the epochs trained."""
    torch.manual_seed(3)
    model = nn.Sequential(toy_case(Plain)[0], nn.Dropout(0.5))
    images = torch.randint(0, 256, (12, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    values = {"epochs": EPOCHS, "batch_size": 4, "lr": 0.1, "amp": False, **changes}
    epochs: list[Epoch] = []
    settings = Settings(**values)  # type: ignore[arg-type]
    trainer = Trainer(settings, Device(torch.device("cpu")), FACTS, checkpoint)
    epochs.extend(trainer.epochs(model, images, torch.arange(12) % 5, on_batch=on_batch))
    return weights(model), epochs


@pytest.mark.parametrize(
    "batch, schedule", [(1, "StepLR"), (4, "MultiStepLR"), (8, "CosineAnnealingLR"), (12, "ReduceLROnPlateau")]
)
def test_a_killed_training_goes_on_with_the_same_bits(batch: int, schedule: str, tmp_path: Path) -> None:
    changes = {"lr_scheduler": schedule, "steplr_stepsize": 1, "steplr_milestones": (1, 2)}
    expected, all_epochs = run(None, **changes)
    path = tmp_path / "training.pt"
    with pytest.raises(Killed):
        run(Checkpoint(path, {}), dies_at(batch), **changes)
    found, rest = run(Checkpoint(path, {}), **changes)
    assert same(found, expected)
    assert rest == all_epochs[(batch - 1) // BATCHES :]  # only what was not finished is trained again


def test_two_kills_and_a_finished_run(tmp_path: Path) -> None:
    expected, _ = run(None)
    path = tmp_path / "training.pt"
    for batch in (5, 5):
        with pytest.raises(Killed):
            run(Checkpoint(path, {}), dies_at(batch))
    for _ in range(2):
        assert same(run(Checkpoint(path, {}))[0], expected)
    assert run(Checkpoint(path, {}))[1] == []  # nothing is left to train


def test_notes_come_back_and_the_file_can_go(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "training.pt"
    first = Checkpoint(path, {"lr": 0.1}, {"history": [(1, "a")]})
    assert first.load() is None
    first.save({"finished": 1})
    second = Checkpoint(path, {"lr": 0.1})
    assert second.load() == {"finished": 1} and second.notes == {"history": [(1, "a")]}
    second.remove()
    second.remove()
    assert not path.exists()


def test_other_settings_are_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "training.pt"
    Checkpoint(path, {"lr": 0.1, "steps": (5, 8), "old": 1}).save({})
    with pytest.raises(UserError, match=r"lr 0\.1 \(now 0\.2\), old 1 \(now None\); give those settings again"):
        Checkpoint(path, {"lr": 0.2, "steps": (5, 8)}).load()


@pytest.mark.parametrize("content", [b"", b"no torch file", None])
def test_a_damaged_checkpoint_is_one_sentence(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "training.pt"
    if content is None:
        torch.save({"weights": torch.ones(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"training\.pt is not a"):
        Checkpoint(path, {}).load()
