"""Fine-tuning: the optimiser, its schedule, and where its random numbers come from."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from fmp_core.data.datasets import DatasetFacts
from fmp_core.errors import UserError
from fmp_core.models.training import Epoch, Trainer, batches_of
from fmp_core.repair.distillation import Teacher
from fmp_core.settings import Settings
from fmp_core.system.devices import Device
from torch import Tensor, nn
from toy import Plain
from toy_cases import same, toy_case, weights

CPU = Device(torch.device("cpu"))
STILL = DatasetFacts(5, (8, 8, 3), crop_padding=0)  # no augmentation
MOVING = DatasetFacts(5, (8, 8, 3), flip=True, crop_padding=2)


def subset(count: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 8, 8), generator=generator).byte(), torch.arange(count) % 5


def run(model: nn.Module, facts: DatasetFacts = STILL, count: int = 10, **changes: object) -> list[Epoch]:
    settings = Settings(**{"epochs": 2, "batch_size": 4, "amp": False, **changes})  # type: ignore[arg-type]
    images, labels = subset(count)
    return list(Trainer(settings, CPU, facts).epochs(model, images, labels))


class OneWeight(nn.Module):
    """Logits (w, 0) whatever the image, and only ``w`` to train: an epoch of one batch is one exact optimiser step."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.stack([self.w, torch.zeros(())]).expand(len(pixels), 2)


def trained_weight(epochs: int, **changes: object) -> list[float]:
    """``w`` after each epoch, one batch each, all labels 1: dloss/dw = sigmoid(w)."""
    model = OneWeight()
    settings = Settings(**{"epochs": epochs, "batch_size": 6, "amp": False, **changes})  # type: ignore[arg-type]
    images = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    return [model.w.item() for _ in Trainer(settings, CPU, STILL).epochs(model, images, torch.ones(6).long())]


def by_hand(rates: list[float], momentum: float = 0.0, decay: float = 0.0) -> list[float]:
    w, velocity, seen = 2.0, 0.0, []
    for rate in rates:
        slope = float(torch.sigmoid(torch.tensor(w, dtype=torch.float64))) + decay * w
        velocity = momentum * velocity + slope
        w -= rate * velocity
        seen.append(w)
    return seen


# cos: lr * (1 + cos(pi*epoch/epochs)) / 2
COSINE = {1: [1.0], 2: [1.0, 0.5], 3: [1.0, 0.75, 0.25], 4: [1.0, 0.853553, 0.5, 0.146447]}


@pytest.mark.parametrize("epochs", COSINE)
def test_the_cosine_spans_the_epochs_really_run(epochs: int) -> None:
    actual = trained_weight(epochs, lr=1.0, sgd_momentum=0.0, wd=0.0)
    assert actual == pytest.approx(by_hand(COSINE[epochs]), abs=1e-5)


def test_step_schedules() -> None:
    plain = {"lr": 1.0, "sgd_momentum": 0.0, "wd": 0.0, "steplr_gamma": 0.5}
    stepped = trained_weight(4, lr_scheduler="StepLR", steplr_stepsize=2, **plain)
    assert stepped == pytest.approx(by_hand([1.0, 1.0, 0.5, 0.5]), abs=1e-5)
    milestones = trained_weight(4, lr_scheduler="MultiStepLR", steplr_milestones=(1, 3), **plain)
    assert milestones == pytest.approx(by_hand([1.0, 0.5, 0.5, 0.25]), abs=1e-5)


def test_the_rate_falls_by_ten_when_the_loss_no_longer_does() -> None:
    """BB's yaml of Tiny ImageNet asks for ReduceLROnPlateau: torch's defaults, so after more than ten epochs without a gain."""
    plain = {"amp": False, "sgd_momentum": 0.0, "wd": 0.0}
    settings = Settings(epochs=14, batch_size=6, lr=1e-6, lr_scheduler="ReduceLROnPlateau", **plain)  # type: ignore[arg-type]
    model = OneWeight().double()
    images, labels = torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.ones(6).long()
    values = [2.0, *(model.w.item() for _ in Trainer(settings, CPU, STILL).epochs(model, images, labels))]
    rates = [before - after for before, after in itertools.pairwise(values)]
    assert all(rate == pytest.approx(rates[0], rel=1e-3) for rate in rates[:11])
    assert rates[-1] == pytest.approx(rates[0] / 10, rel=1e-3)


def test_momentum_and_weight_decay_are_used() -> None:
    actual = trained_weight(3, lr=0.5, sgd_momentum=0.9, wd=0.1)
    assert actual == pytest.approx(by_hand([0.5, 0.375, 0.125], momentum=0.9, decay=0.1), abs=1e-5)


def test_an_epoch_reports_what_happened() -> None:
    model = OneWeight()
    images, labels = torch.zeros(6, 3, 8, 8).byte(), torch.tensor([0, 0, 0, 1, 1, 1])
    settings = Settings(epochs=2, batch_size=3, lr=1e-12, amp=False)
    epochs = list(Trainer(settings, CPU, STILL).epochs(model, images, labels))
    # logits (2, 0): always class 0, right for half of the images; losses log(1+e^-2) and log(1+e^2)
    loss = (F.softplus(torch.tensor(-2.0)) + F.softplus(torch.tensor(2.0))).item() / 2
    for number, epoch in enumerate(epochs):
        assert (epoch.epoch, epoch.batch, epoch.train_acc) == (number, 2, 0.5)
        assert epoch.train_epoch_loss_avg_over_batch == pytest.approx(loss, rel=1e-5)


def test_batches_hold_each_image_once_and_a_last_one_alone_is_dropped() -> None:
    generator = torch.Generator().manual_seed(0)
    for count, sizes in ((8, [4, 4]), (10, [4, 4, 2]), (9, [4, 4]), (3, [3])):
        batches = batches_of(count, 4, generator)
        assert [len(batch) for batch in batches] == sizes
        indices = torch.cat(batches).tolist()
        assert len(set(indices)) == len(indices) and set(indices) <= set(range(count))
    assert torch.cat(batches_of(50, 4, generator)).tolist() != torch.cat(batches_of(50, 4, generator)).tolist()  # shuffled


@pytest.mark.parametrize(("count", "left"), [(8, 8), (9, 8), (10, 8), (11, 8), (12, 12)])
def test_no_gpu_of_two_trains_on_one_image(count: int, left: int) -> None:
    assert sum(map(len, batches_of(count, 8, torch.Generator(), parts=2))) == left


def test_a_batch_norm_model_trains_though_one_image_is_over() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5))  # raises on a batch of one
    assert [epoch.batch for epoch in run(model, count=9)] == [2, 2]


def test_the_same_seed_trains_the_same_bits() -> None:
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(random.randrange(2**31))  # whatever the global generator holds
        model = toy_case(Plain)[0]
        epochs = run(model, MOVING, random_seed=seed)
        results.append((weights(model), epochs))
    assert same(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert not same(results[0][0], results[2][0])


def test_dropout_is_deterministic_too() -> None:
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(random.randrange(2**31))
        model = toy_case(Plain)[0]
        dropped = nn.Sequential(model, nn.Dropout(0.5))
        run(dropped, random_seed=seed)
        results.append(weights(model))
    assert same(results[0], results[1]) and not same(results[0], results[2])


def test_the_global_generator_is_the_callers_between_epochs_too() -> None:
    """What a caller draws while it tests changes no bit of the training, and the training none of what the caller draws."""
    results, drawn = [], []
    images, labels = subset()
    for draws in (True, False):
        model = nn.Sequential(toy_case(Plain)[0], nn.Dropout(0.5))
        torch.manual_seed(7)
        for _ in Trainer(Settings(epochs=2, batch_size=4, amp=False), CPU, MOVING).epochs(model, images, labels):
            drawn += [torch.rand(4)] if draws else []
        results.append(weights(model))
    torch.manual_seed(7)
    assert len(drawn) == 2 and all(torch.equal(torch.rand(4), value) for value in drawn)
    assert same(*results)


def test_amp_keeps_master_weights_in_float32() -> None:
    model, exact = toy_case(Plain)[0], toy_case(Plain)[0]
    run(model, amp=True)
    run(exact, amp=False)
    for (name, value), other in zip(model.state_dict().items(), exact.state_dict().values(), strict=True):
        assert value.dtype == other.dtype
        if value.is_floating_point():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, other, rtol=0.1, atol=0.05, msg=name)
            rounded = value.to(torch.bfloat16).float()
            assert value.numel() < 5 or not torch.equal(value, rounded)  # it was not kept in bfloat16 in between


def test_amp_trains_the_same_bits_where_maps_are_one_pixel() -> None:
    """oneDNN's bfloat16 weight gradient of a strided, padded 3x3 convolution on one pixel is partly uninitialised memory."""
    results = []
    for _ in range(4):
        torch.manual_seed(0)
        strided = nn.Conv2d(16, 64, 3, stride=2, padding=1, bias=False)
        model = nn.Sequential(nn.Conv2d(3, 16, 8), strided, nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(64, 5))
        spoiled = [torch.full((strided.weight.numel(),), torch.nan) for _ in range(4)]
        del spoiled  # memory that is handed out again without being cleared holds NaN now
        run(model, amp=True, count=8)
        results.append(weights(model))
        assert all(torch.isfinite(value).all() for value in results[-1].values())
    assert all(same(results[0], other) for other in results[1:])


def test_a_model_in_evaluation_mode_is_trained_in_training_mode() -> None:
    """So that the statistics of batch norms follow."""
    model = toy_case(Plain)[0].eval()
    before = model.network.bn1.num_batches_tracked.clone()
    run(model)
    assert model.network.bn1.num_batches_tracked == before + 2 * 3


def test_training_trains() -> None:
    model = toy_case(Plain)[0]
    epochs = run(model, epochs=40, lr=0.05)
    assert epochs[-1].train_epoch_loss_avg_over_batch < 0.6 * epochs[0].train_epoch_loss_avg_over_batch
    assert [epoch.epoch for epoch in epochs] == list(range(40))


def test_every_batch_is_announced_with_its_rows_and_predictions() -> None:
    calls: list[tuple[Tensor, Tensor]] = []
    images, labels = subset(10)
    settings = Settings(epochs=3, batch_size=4)
    trainer = Trainer(settings, CPU, STILL)
    epochs = list(trainer.epochs(toy_case(Plain)[0], images, labels, on_batch=lambda *batch: calls.append(batch)))
    assert len(calls) == 9
    for number, epoch in enumerate(epochs):
        rows, predicted = (torch.cat(part) for part in zip(*calls[3 * number : 3 * number + 3], strict=True))
        assert sorted(rows.tolist()) == list(range(10))
        assert float((predicted == labels[rows]).double().mean()) == epoch.train_acc


def test_a_teacher_pulls_with_its_weight() -> None:
    """Logits (w, 0), labels 1, and a teacher who says 0.8, 0.2: d(loss)/dw = sigmoid(w) + weight * (sigmoid(w) - 0.8)."""

    class Says(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return torch.tensor([0.8, 0.2]).log().expand(len(pixels), 2)

    model, teacher = OneWeight(), Teacher(Says(), weight=3.0)
    settings = Settings(epochs=1, batch_size=6, amp=False, lr=1.0, sgd_momentum=0, wd=0)
    images, labels = torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.ones(6).long()
    list(Trainer(settings, CPU, STILL).epochs(model, images, labels, teacher=teacher.loss))
    says = torch.sigmoid(torch.tensor(2.0))
    assert model.w.item() == pytest.approx(float(2.0 - (says + 3 * (says - 0.8))), abs=1e-6)


@pytest.mark.parametrize(("share", "least", "most"), [(0.5, 12, 28), (0.2, 2, 16), (1.0, 40, 40)])
def test_the_teacher_sees_clean_images_moved_like_their_substitutes(share: float, least: int, most: int) -> None:
    """Substitutes differ from the images in the first channel only; in the others both nets see the same, crop for crop."""
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}

    class Looking(nn.Module):
        def __init__(self, name: str):
            super().__init__()
            self.name, self.linear = name, nn.Linear(3 * 64, 5)

        def forward(self, pixels: Tensor) -> Tensor:
            seen[self.name].append(pixels.detach().clone())
            return self.linear(pixels.flatten(1))

    images, labels = subset(40)
    changed = images.clone()
    changed[:, 0] = 255 - images[:, 0]
    settings = Settings(epochs=1, batch_size=8, amp=False, unlearn=share)
    trainer = Trainer(settings, CPU, MOVING).epochs(
        Looking("student"),
        images,
        labels,
        substitutes=lambda _epoch: changed,
        teacher=Teacher(Looking("teacher"), weight=1.0).loss,
    )
    assert len(list(trainer)) == 1
    student, teacher = (torch.cat(seen[name]) for name in ("student", "teacher"))
    assert torch.equal(student[:, 1:], teacher[:, 1:])
    differ = (student[:, 0] != teacher[:, 0]).flatten(1).any(1)
    assert least <= int(differ.sum()) <= most  # by chance an image is substituted for the student


def test_no_weight_no_teacher() -> None:
    """A teacher of weight 0 changes no bit, nor does it take random numbers."""
    torch.manual_seed(0)
    one, other = Plain(), Plain()
    other.load_state_dict(one.state_dict())
    images, labels = subset()
    settings = Settings(epochs=2, batch_size=4, amp=False)
    for model, told in ((one, None), (other, Teacher.copy_of(Plain(), weight=0.0).loss)):
        list(Trainer(settings, CPU, MOVING).epochs(model, images, labels, teacher=told))
    assert same(weights(one), weights(other))


def test_fewer_than_two_images_are_refused() -> None:
    with pytest.raises(UserError, match="at least 2 images, not 1"):
        run(toy_case(Plain)[0], count=1)


def test_a_batch_size_of_which_some_gpu_always_gets_one_image_is_refused() -> None:
    images, labels = torch.zeros(10, 3, 8, 8, dtype=torch.uint8), torch.zeros(10, dtype=torch.int64)
    trainer = Trainer(Settings(epochs=1, batch_size=5, amp=False), Device(CPU.device, (0, 1, 2, 3)), STILL)
    with pytest.raises(UserError, match=r"Batches of 5 images leave one image to one of 4 GPUs.*--batch_size"):
        next(trainer.epochs(Plain(), images, labels))
