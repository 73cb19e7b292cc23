"""Training on uint8 images that lie on the device: of FMP's fine-tuning, and of the attacks of ``make_record.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, ReduceLROnPlateau, StepLR

from fmp_core.data.datasets import DatasetFacts
from fmp_core.errors import UserError
from fmp_core.models.evaluate import to_unit
from fmp_core.models.one_pixel import OnePixelConvolutions
from fmp_core.settings import Settings
from fmp_core.storage.checkpoint import Checkpoint
from fmp_core.system.devices import Device, has_fast_bfloat16


@dataclass(frozen=True)
class Epoch:
    """What BB reports of a training epoch: 0-based number, batches, mean of batch losses, training-mode accuracy in [0,1]."""

    epoch: int
    batch: int
    train_epoch_loss_avg_over_batch: float
    train_acc: float


@dataclass(frozen=True)
class Crops:
    """BB's training transform, drawn for ``B`` images: zero-pad by ``padding``, crop at ``shifts``, flip where ``mirrored``.

    ``shifts`` are int64 ``[B, 2, 1]`` (down, right) in 0..2*padding, ``mirrored`` is bool ``[B, 1]``. Applied to several
    batches, it moves their images alike.
    """

    padding: int
    shifts: Tensor
    mirrored: Tensor

    @staticmethod
    def draw(count: int, generator: torch.Generator, facts: DatasetFacts) -> Crops:
        """Draw for ``count`` images from a generator on the CPU, so that no number depends on the device."""
        shifts = torch.randint(0, 2 * facts.crop_padding + 1, (2, count, 1), generator=generator)
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        return Crops(facts.crop_padding, shifts.transpose(0, 1), mirrored & facts.flip)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 ``[B, C, H, W]`` on the device of the draws -> the same, moved."""
        count, _, height, width = images.shape
        rows = self.shifts[:, 0] + torch.arange(height, device=images.device)
        columns = self.shifts[:, 1] + torch.arange(width, device=images.device)
        columns = torch.where(self.mirrored, columns.flip(1), columns)
        padded = F.pad(images, [self.padding] * 4)
        picture = torch.arange(count, device=images.device)[:, None, None]
        return padded[picture, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


OnBatch = Callable[[Tensor, Tensor], None]
TeacherLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def batches_of(count: int, batch_size: int, generator: torch.Generator, parts: int = 1) -> list[Tensor]:
    """Shuffled indices in batches. A last batch of which a GPU of ``parts`` would get one image is left out: batch norm cannot
    train on it."""
    order = torch.randperm(count, generator=generator)
    return [batch for batch in order.split(batch_size) if all(len(part) > 1 for part in batch.chunk(parts))]


class _InBfloat16(nn.Module):
    """``model`` under autocast of its own: DataParallel's threads would take float16 from the one around them."""

    def __init__(self, model: nn.Module, enabled: bool):
        super().__init__()
        self.model, self.enabled = model, enabled

    def forward(self, pixels: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.enabled):
            return self.model(pixels)


@dataclass(frozen=True)
class Trainer:
    """SGD as BB configures it: ``for epoch in Trainer(settings, device, facts).epochs(model, images, labels): ...``.

    Args:
        device: with several ``device_ids``, the batch is split over them.
        facts: of the dataset; they shape the training transform.
        checkpoint: the state is saved there after each epoch, and epochs found there are not trained again: a killed and
            repeated training ends, on a CPU, with the bits of an uninterrupted one.
    """

    settings: Settings
    device: Device
    facts: DatasetFacts
    checkpoint: Checkpoint | None = None

    def epochs(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        on_batch: OnBatch | None = None,
        substitutes: Callable[[int], Tensor] | None = None,
        teacher: TeacherLoss | None = None,
    ) -> Iterator[Epoch]:
        """Train ``model`` (of pixels in [0,1]; on the device) in place, epoch by epoch, for ``settings.epochs`` epochs.

        Between two epochs the caller may test the model, but must leave it as it is; the checkpoint of an epoch is saved when
        the caller asks for the next one, so that its notes can hold the test's metrics.

        Args:
            images: uint8 ``[N, C, H, W]``; labels: int64 ``[N]``; both on the device.
            on_batch: called after each step with the positions of the batch and the classes that were predicted in training
                mode, both int64 ``[B]`` on the device.
            substitutes: called with the number of each epoch as it begins, returns uint8 like ``images``; each image
                is replaced by its substitute with probability ``settings.unlearn``. They may depend on the model, but not on
                earlier calls.
            teacher: gives a second loss from the logits, the images of the batch (uint8, never substituted, moved like those
                the model sees) and their labels.

        Raises UserError if there are fewer than two images, or the checkpoint is of other settings.
        """
        if len(images) < 2:
            raise UserError(f"Training needs at least 2 images, not {len(images)}.")
        training = _Training(self, model)
        usual = torch.arange(min(self.settings.batch_size, len(images)))
        if not batches_of(len(usual), len(usual), torch.Generator(), training.parts):
            raise UserError(
                f"Batches of {len(usual)} images leave one image to one of {training.parts} GPUs, on which batch norm cannot "
                "train; use another --batch_size or fewer GPUs."
            )
        saved = self.checkpoint.load() if self.checkpoint else None
        for number in range(training.restore(saved) if saved else 0, self.settings.epochs):
            with training.global_generators():
                changed = substitutes(number) if substitutes else None
                epoch = training.epoch(number, images, labels, changed, on_batch, teacher)
            if isinstance(training.scheduler, ReduceLROnPlateau):
                training.scheduler.step(epoch.train_epoch_loss_avg_over_batch)  # as BB
            else:
                training.scheduler.step()
            yield epoch
            if self.checkpoint:
                self.checkpoint.save(training.state(number + 1))


def training_precision(settings: Settings, device: torch.device) -> torch.dtype:
    """That of forward and backward passes; weights stay float32."""
    return torch.bfloat16 if settings.amp and has_fast_bfloat16(device) else torch.float32


class _Training:
    """A training under way: what changes in it, to and from the plain data of a checkpoint.

    ``generator`` draws batches and crops. Torch's global generators, of which dropout draws, are the training's own within
    :meth:`global_generators`, and the caller's elsewhere.
    """

    def __init__(self, trainer: Trainer, model: nn.Module):
        settings, device, ids = trainer.settings, trainer.device.device, trainer.device.device_ids
        self.model, self.facts, self.batch_size, self.seed = model, trainer.facts, settings.batch_size, settings.random_seed
        self.unlearn = settings.unlearn
        self.cuda = ids or ((device.index,) if device.type == "cuda" else ())
        self.bfloat16 = training_precision(settings, device) == torch.bfloat16
        self.parts = max(1, len(ids))
        self.parallel = nn.DataParallel(_InBfloat16(model, self.bfloat16), list(ids)) if self.parts > 1 else model
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=settings.lr, momentum=settings.sgd_momentum, weight_decay=settings.wd
        )
        self.scheduler = _scheduler(self.optimizer, settings)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.drawn: list[Tensor] = []  # states of the global generators

    @contextmanager
    def global_generators(self) -> Iterator[None]:
        generators = [torch.default_generator, *(torch.cuda.default_generators[index] for index in self.cuda)]
        with torch.random.fork_rng(devices=self.cuda):
            for number, generator in enumerate(generators):
                known = number < len(self.drawn)
                generator.set_state(self.drawn[number]) if known else generator.manual_seed(self.seed)
            yield
            self.drawn = [generator.get_state() for generator in generators]

    def state(self, finished: int) -> dict[str, Any]:
        """All of it after ``finished`` epochs."""
        return {
            "finished": finished,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {key: value for key, value in self.scheduler.state_dict().items() if key != "milestones"},
            "generator": self.generator.get_state(),
            "global_generator": self.drawn[0],
            "cuda_generators": self.drawn[1:],
        }

    def restore(self, saved: dict[str, Any]) -> int:
        """Go back to what :meth:`state` gave; returns how many epochs are finished."""
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.generator.set_state(saved["generator"])
        self.drawn = [saved["global_generator"], *saved["cuda_generators"]]
        return int(saved["finished"])

    def batches(self, count: int, substitutes: bool, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None, Crops]]:
        """Of each batch of an epoch the positions int64 ``[B]``, which images to substitute (bool ``[B]``), and the crops.

        Drawn batch by batch on the CPU, then moved to ``device`` all at once, so that a GPU waits for none of them.
        """
        positions = batches_of(count, self.batch_size, self.generator, self.parts)
        coins, crops = [], []
        for batch in positions:
            if substitutes:
                coins.append(torch.rand(len(batch), generator=self.generator) < self.unlearn)
            crops.append(Crops.draw(len(batch), self.generator, self.facts))

        def moved(parts: list[Tensor]) -> tuple[Tensor, ...]:
            return torch.cat(parts).to(device).split([len(part) for part in parts])

        shifts, mirrored = moved([crop.shifts for crop in crops]), moved([crop.mirrored for crop in crops])
        substituted = moved(coins) if substitutes else [None] * len(positions)
        for rows, chosen, *drawn in zip(moved(positions), substituted, shifts, mirrored, strict=True):
            yield rows, chosen, Crops(self.facts.crop_padding, *drawn)

    def epoch(
        self,
        number: int,
        images: Tensor,
        labels: Tensor,
        substitutes: Tensor | None,
        on_batch: OnBatch | None,
        teacher: TeacherLoss | None,
    ) -> Epoch:
        """One epoch; what it came to is read from the device once, at its end."""
        self.parallel.train()
        device, losses, seen = images.device, [], 0
        hits = torch.zeros((), dtype=torch.int64, device=device)
        for rows, substituted, crops in self.batches(len(images), substitutes is not None, device):
            plain, target = images[rows], labels[rows]
            pixels = plain
            if substitutes is not None and substituted is not None:
                pixels = torch.where(substituted[:, None, None, None], substitutes[rows], plain)
            products = OnePixelConvolutions() if device.type == "cpu" else nullcontext()
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16), products:
                logits = self.parallel(to_unit(crops(pixels)).contiguous(memory_format=torch.channels_last))
                loss = F.cross_entropy(logits, target)
                if teacher is not None:
                    loss = loss + teacher(logits, crops(plain), target)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            predicted = logits.detach().argmax(1)
            losses.append(loss.detach().float())
            hits += (predicted == target).sum()
            seen += len(rows)
            if on_batch is not None:
                on_batch(rows, predicted)
        mean, right = torch.stack([torch.stack(losses).double().mean(), hits.double()]).tolist()
        return Epoch(number, len(losses), mean, right / seen)


def _scheduler(optimizer: torch.optim.Optimizer, settings: Settings) -> LRScheduler:
    """One step per epoch; the cosine ends with the last epoch really run (BB's T_max is 100 whatever is run)."""
    if settings.lr_scheduler == "StepLR":
        return StepLR(optimizer, settings.steplr_stepsize, settings.steplr_gamma)
    if settings.lr_scheduler == "MultiStepLR":
        return MultiStepLR(optimizer, list(settings.steplr_milestones), settings.steplr_gamma)
    if settings.lr_scheduler == "ReduceLROnPlateau":  # BB's yaml of Tiny ImageNet; torch's defaults, as there
        return ReduceLROnPlateau(optimizer)
    return CosineAnnealingLR(optimizer, max(1, settings.epochs))
