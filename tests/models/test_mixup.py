"""Mixup: pixels and losses in the shares drawn, and who sees which image in training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fmp_core.data.datasets import DatasetFacts
from fmp_core.models.batches import Batch, Crops, Mixup, Plan
from fmp_core.models.evaluate import to_unit
from fmp_core.models.training import Trainer
from fmp_core.repair.distillation import Teacher
from fmp_core.settings import Settings
from fmp_core.system.devices import Device
from torch import Tensor, nn
from toy import Plain
from toy_cases import same, weights

CPU = Device(torch.device("cpu"))
STILL = DatasetFacts(5, (8, 8, 3), crop_padding=0)
PAIRS = Mixup(torch.tensor([2, 0, 1]), torch.tensor([0.25, 1.0, 0.5]))
LABELS = torch.tensor([4, 3, 1])


def images_of(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()


def test_an_image_keeps_its_share_and_takes_the_rest_from_its_partner() -> None:
    pixels = to_unit(images_of(3))
    mixed = PAIRS(pixels)
    torch.testing.assert_close(mixed[0], 0.25 * pixels[0] + 0.75 * pixels[2])
    torch.testing.assert_close(mixed[2], 0.5 * pixels[2] + 0.5 * pixels[1])
    assert torch.equal(mixed[1], pixels[1])  # to the bit


def test_an_image_shows_its_partners_class_unless_it_is_not_mixed() -> None:
    assert PAIRS.labels(LABELS).tolist() == [[4, 1], [3, 3], [1, 3]]


def test_the_loss_is_that_of_both_labels_in_their_shares() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    batch = Batch(torch.arange(3), Crops.draw(3, torch.Generator(), STILL), None, PAIRS)
    single = [[F.cross_entropy(logits[n : n + 1], torch.tensor([k])).item() for k in range(5)] for n in range(3)]
    by_hand = (0.25 * single[0][4] + 0.75 * single[0][1] + single[1][3] + 0.5 * single[2][1] + 0.5 * single[2][3]) / 3
    assert abs(batch.loss(logits, batch.classes(LABELS)).item() - by_hand) < 1e-6


def test_shares_are_drawn_from_all_of_0_to_1_and_partners_within_the_batch() -> None:
    plan = Plan(batch_size=50, parts=1, substituted=None, mixup=True, facts=STILL)
    batches = plan.draw(100, torch.Generator().manual_seed(0), torch.device("cpu"))
    for batch in batches:
        assert batch.mixup is not None
        assert sorted(batch.mixup.partner.tolist()) == list(range(50))
        assert batch.mixup.share.min() < 0.1 and batch.mixup.share.max() > 0.9
    assert not torch.equal(batches[0].mixup.share, batches[1].mixup.share)  # type: ignore[union-attr]


class Looking(nn.Module):
    """Keeps what it sees; its logits do not depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.logits = nn.Parameter(torch.zeros(5))

    def forward(self, pixels: Tensor) -> Tensor:
        self.seen.append(pixels.detach().clone())
        return self.logits.expand(len(pixels), -1)


def test_substitutes_are_not_mixed_and_the_teacher_sees_what_stands_in_their_place() -> None:
    """Images of the training set are single grey levels, substitutes white, so each pixel value tells where it comes from."""
    count = 40
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].mul(5).expand(count, 3, 8, 8).contiguous()
    white = torch.full_like(images, 255)
    student, teacher, rows = Looking(), Looking(), []
    settings = Settings(epochs=1, batch_size=20, amp=False, unlearn=0.5, mixup=True)
    epochs = Trainer(settings, CPU, STILL).epochs(
        student,
        images,
        torch.arange(count) % 5,
        substitutes=lambda _: white,
        teacher=Teacher(teacher, weight=1.0).loss,
        on_batch=lambda batch, _: rows.append(batch),
    )
    assert len(list(epochs)) == 1
    seen, shown = (torch.cat(model.seen)[:, 0, 0, 0] * 255 for model in (student, teacher))
    plain = images[torch.cat(rows), 0, 0, 0].float()
    substituted = seen == 255
    assert 10 <= int(substituted.sum()) <= 30
    torch.testing.assert_close(shown[substituted], plain[substituted])  # unmixed
    assert torch.equal(shown[~substituted], seen[~substituted])
    assert int((shown[~substituted] - plain[~substituted]).abs().gt(1).sum()) > 10  # mixed


def test_the_target_is_left_out_of_mixed_images_that_do_not_show_it() -> None:
    class Says(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return torch.tensor([0.5, 0.2, 0.3]).log().expand(len(pixels), -1)

    shown = torch.tensor([[0, 1], [1, 0], [2, 1], [0, 0]])
    found = Teacher(Says(), weight=1.0, target=0).probabilities(torch.zeros(4, 3, 8, 8), shown)
    torch.testing.assert_close(found[:, 0], torch.tensor([0.5, 0.5, 0.0, 0.5]))


def test_mixup_trains_otherwise_and_alike_with_the_same_seed() -> None:
    images, labels = images_of(20), torch.arange(20) % 5
    trained = []
    for mixup in (False, True, True):
        torch.manual_seed(0)
        model = Plain()
        list(Trainer(Settings(epochs=2, batch_size=8, amp=False, mixup=mixup), CPU, STILL).epochs(model, images, labels))
        trained.append(weights(model))
    assert same(trained[1], trained[2]) and not same(trained[0], trained[1])
