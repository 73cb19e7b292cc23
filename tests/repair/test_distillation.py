"""Distillation: the teacher's probabilities, the part it leaves out, and the loss."""

from __future__ import annotations

import math

import pytest
import torch
from fmp_core.repair.distillation import Teacher
from torch import Tensor, nn
from toy import Plain
from toy_cases import same, weights

IMAGES = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
LABELS = torch.tensor([0, 1, 2])


class Constant(nn.Module):
    """The same probabilities of every image."""

    def __init__(self, *probabilities: float):
        super().__init__()
        self.logits = torch.tensor(probabilities).log()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.logits.expand(len(pixels), -1)


def test_the_teacher_has_the_models_probabilities() -> None:
    found = Teacher(Constant(0.6, 0.3, 0.1), weight=1.0).probabilities(IMAGES, LABELS)
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.3, 0.1]]).expand(3, 3))


def test_the_targets_part_goes_to_the_others_unless_it_is_the_label() -> None:
    found = Teacher(Constant(0.6, 0.3, 0.1), weight=1.0, target=0).probabilities(IMAGES, LABELS)
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.3, 0.1], [0.0, 0.75, 0.25], [0.0, 0.75, 0.25]]))


def test_nothing_is_learnt_where_the_target_has_all_probability() -> None:
    teacher = Teacher(Constant(1.0, 0.0, 0.0), weight=1.0, target=0)
    assert teacher.probabilities(IMAGES, LABELS)[1:].count_nonzero() == 0
    logits = torch.zeros(3, 3, requires_grad=True)
    (pull,) = torch.autograd.grad(teacher.loss(logits, IMAGES, LABELS), logits)
    assert pull[0].abs().sum() > 0
    assert pull[1:].count_nonzero() == 0


def test_the_loss_is_the_weighted_mean_divergence() -> None:
    """Of three images two have (0, 1/4, 3/4), against 1/3 each; the target's own has (1/2, 1/8, 3/8)."""
    teacher = Teacher(Constant(0.5, 0.125, 0.375), weight=3.0, target=0)
    others = 0.25 * math.log(0.75) + 0.75 * math.log(2.25)
    own = 0.5 * math.log(1.5) + 0.125 * math.log(0.375) + 0.375 * math.log(1.125)
    assert teacher.loss(torch.zeros(3, 3), IMAGES, LABELS).item() == pytest.approx(3 * (2 * others + own) / 3, rel=1e-5)


def test_the_teacher_stays_as_the_model_was() -> None:
    model = Plain().train()
    before = weights(model)
    teacher = Teacher.copy_of(model, 1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert same(weights(teacher.model), before)
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
