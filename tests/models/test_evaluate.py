"""Acc, ASR and RA as BackdoorBench counts them."""

from __future__ import annotations

import math

import pytest
import torch
from fmp_core.models.evaluate import TestData as Data  # pytest would take a name Test* for a test
from fmp_core.models.evaluate import evaluate, even_sample, predict, to_unit
from torch import Tensor, nn
from toy import Plain
from toy_cases import footprint, toy_case, weights


class Brightest(nn.Module):
    """Logits are 4 * the mean of each channel in [0,1], so the class is the brightest channel."""

    def forward(self, pixels: Tensor) -> Tensor:
        return 4 * pixels.mean((2, 3))


def shades(*rows: tuple[int, int, int]) -> Tensor:
    """Plain images of these channel values, uint8 ``[N, 3, 2, 2]``."""
    return torch.tensor(rows, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 2, 2).contiguous()


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def test_known_predictions_give_known_fractions() -> None:
    data = Data(
        clean_images=shades(RED, GREEN, BLUE, BLUE),
        clean_labels=torch.tensor([0, 1, 2, 0]),
        poisoned_images=shades(RED, RED, GREEN, BLUE, BLUE),
        targets=torch.tensor([0, 0, 0, 0, 0]),
        originals=torch.tensor([1, 2, 1, 1, 1]),
    )
    images: list[int] = []
    metrics, predictions = evaluate(Brightest(), data, batch_size=2, on_images=images.append)
    assert (predictions.clean.tolist(), predictions.poisoned.tolist()) == ([0, 1, 2, 2], [0, 0, 1, 2, 2])
    assert sum(images) == len(data) == 9  # progress counts every image once
    assert metrics.headline() == {"test_acc": 3 / 4, "test_asr": 2 / 5, "test_ra": 1 / 5}
    assert (metrics.test_acc, metrics.test_asr, metrics.test_ra) == (0.75, 0.4, 0.2)


def test_the_loss_is_the_mean_of_batch_means() -> None:
    # A right image has logits (4, 0, 0): loss log(e^4 + 2) - 4; a wrong one log(e^4 + 2).
    right, wrong = math.log(math.exp(4) + 2) - 4, math.log(math.exp(4) + 2)
    images, labels = shades(RED, RED, RED, RED, RED), torch.tensor([0, 0, 0, 0, 1])
    for batch_size, batches in ((4, [right, wrong]), (5, [(4 * right + wrong) / 5]), (2, [right, right, wrong])):
        classes, loss = predict(Brightest(), images, labels, batch_size)
        assert float(loss) == pytest.approx(sum(batches) / len(batches), rel=1e-5)
        assert classes.tolist() == [0] * 5


def test_clean_and_poisoned_losses_are_told_apart() -> None:
    data = Data(shades(RED), torch.tensor([0]), shades(GREEN), torch.tensor([0]), torch.tensor([1]))
    metrics = evaluate(Brightest(), data, 8).metrics
    assert metrics.clean_test_loss_avg_over_batch == pytest.approx(math.log(math.exp(4) + 2) - 4, rel=1e-5)
    assert metrics.bd_test_loss_avg_over_batch == pytest.approx(math.log(math.exp(4) + 2), rel=1e-5)


def test_pixels_become_fractions_as_totensor_makes_them() -> None:
    assert to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert to_unit(torch.tensor([3], dtype=torch.uint8)).dtype == torch.float32


def test_many_images_keep_their_order() -> None:
    """More images than one forward pass takes, on any device."""
    classes = torch.randint(0, 3, (1500,), generator=torch.Generator().manual_seed(0))
    images = torch.tensor([RED, GREEN, BLUE], dtype=torch.uint8)[classes][:, :, None, None].expand(-1, -1, 2, 2)
    assert torch.equal(predict(Brightest(), images, classes, 256)[0], classes)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_as_found(training: bool) -> None:
    model = toy_case(Plain)[0].train(training)
    model.network.bn2.train()
    model.network.conv1.weight.requires_grad_(False)
    before, state = footprint(model), weights(model)
    images, labels = torch.randint(0, 256, (9, 3, 8, 8)).byte(), torch.zeros(9, dtype=torch.int64)
    torch.manual_seed(5)
    evaluate(model, Data(images, labels, images, labels, labels), 4)
    drawn = torch.rand(2)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(2), drawn)
    assert footprint(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_evaluation_is_in_evaluation_mode_even_while_training() -> None:
    model = toy_case(Plain)[0]
    images, labels = torch.randint(0, 256, (9, 3, 8, 8)).byte(), torch.arange(9) % 5
    losses = [predict(model.train(training), images, labels, 4)[1] for training in (True, False)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("count", [1, 4, 7, 12, 99])
def test_a_sample_is_even_over_the_classes(count: int) -> None:
    labels = torch.tensor([0, 1, 2, 3] * 3)
    rows = even_sample(labels, count)
    assert len(rows) == min(count, 12) and rows.tolist() == sorted(set(rows.tolist()))
    counts = torch.bincount(labels[rows], minlength=4)
    assert int(counts.max() - counts.min()) <= 1


class Crowded(Plain):
    """Out of memory with more than ``room`` images."""

    room = 5

    def forward(self, pixels: Tensor) -> Tensor:
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(pixels)


def test_a_batch_that_memory_runs_out_in_is_halved() -> None:
    images, labels = torch.randint(256, (70, 3, 8, 8), dtype=torch.uint8), torch.zeros(70, dtype=torch.int64)
    torch.manual_seed(0)
    crowded = Crowded()
    counts: list[int] = []
    predicted, _ = predict(crowded, images, labels, 256, counts.append)
    assert max(counts) <= crowded.room and sum(counts) == 70
    crowded.room = 70
    assert torch.equal(predicted, predict(crowded, images, labels, 256)[0])
    crowded.room = 0
    with pytest.raises(torch.OutOfMemoryError):
        predict(crowded, images, labels, 256)


def test_a_sample_is_even_within_each_class_too() -> None:
    """Folders of images often come by scene or by day: the first ones of a class would be alike."""
    in_order, in_turn = torch.arange(40) // 20, torch.arange(40) % 2
    assert even_sample(in_order, 8).tolist() == [0, 5, 10, 15, 20, 25, 30, 35]
    assert even_sample(in_turn, 8).tolist() == [0, 1, 10, 11, 20, 21, 30, 31]
