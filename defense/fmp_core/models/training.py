"""Training on uint8 images that lie on the device: of FMP's fine-tuning, and of the attacks of ``make_record.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, StepLR

from fmp_core.data.datasets import DatasetFacts
from fmp_core.errors import UserError
from fmp_core.models.evaluate import to_unit
from fmp_core.models.feature_maps import frozen
from fmp_core.settings import Settings
from fmp_core.storage.checkpoint import Checkpoint, TrainingParts
from fmp_core.system.devices import Device, has_fast_bfloat16


@dataclass(frozen=True)
class Epoch:
    """What BB reports of a training epoch: 0-based number, batches, mean of batch losses, training-mode accuracy in [0,1]."""

    epoch: int
    batch: int
    train_epoch_loss_avg_over_batch: float
    train_acc: float


def augment(images: Tensor, generator: torch.Generator, facts: DatasetFacts) -> Tensor:
    """BB's training transform for a whole batch: zero-pad, random crop back, and random horizontal flip where ``facts`` say so.

    uint8 ``[B, C, H, W]`` in, the same out. Random numbers come from a CPU generator, so they do not depend on the device.
    """
    count, _, height, width = images.shape
    padding = facts.crop_padding
    shifts = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    rows = shifts[0] + torch.arange(height)
    columns = shifts[1] + torch.arange(width)
    if facts.flip:
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    padded = F.pad(images, [padding] * 4)
    picture = torch.arange(count, device=images.device)[:, None, None]
    return padded[picture, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def batches_of(count: int, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """Shuffled indices in batches; a last batch of one image is left out, since batch norm cannot train on it."""
    batches = list(torch.randperm(count, generator=generator).split(batch_size))
    return [batch for batch in batches if len(batch) > 1]


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: Settings,
    compute: Device,
    *,
    facts: DatasetFacts,
    after_epoch: Callable[[Epoch], None],
    after_batch: Callable[[], None] = lambda: None,
    twins: Callable[[int], Tensor] | None = None,
    teacher: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    after_predictions: Callable[[Tensor, Tensor], None] = lambda rows, classes: None,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Train ``model`` in place with SGD for ``settings.epochs`` epochs.

    With a ``checkpoint``, the state is saved there after each epoch, and epochs found there are not trained again: a killed
    and repeated call ends, on a CPU, with the bits of an uninterrupted one.

    Args:
        model: takes pixels in [0,1]; on ``compute.device``.
        images: uint8 ``[N, C, H, W]``; labels: int64 ``[N]``; both on the device.
        settings: batch_size, lr, lr_scheduler, sgd_momentum, wd, amp, epochs, random_seed.
        facts: of the dataset; they shape the training transform.
        twins: called with the number of each epoch as it begins, returns uint8 like ``images``; each image is replaced by its
            twin every other time, by chance. What it returns may depend on the model, but not on earlier calls.
        teacher: gives a second loss from the logits, the images of the batch (uint8, never their twins) and their labels.
        after_epoch: called after each epoch; must leave the model as it found it.
        after_predictions: called with the positions of a batch and the classes predicted in training mode, both int64 ``[B]``.

    Raises:
        UserError: fewer than two images, or a checkpoint of other settings.
    """
    if len(images) < 2:
        raise UserError(f"Fine-tuning needs at least 2 clean images, not {len(images)}; raise --ratio.")
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=settings.sgd_momentum, weight_decay=settings.wd)
    scheduler = _scheduler(optimizer, settings)
    generator = torch.Generator().manual_seed(settings.random_seed)
    parallel = nn.DataParallel(model, list(compute.device_ids)) if compute.device_ids else model
    bfloat16 = settings.amp and has_fast_bfloat16(compute.device) and not _meets_faulty_kernel(model, images[:1])
    cuda = compute.device_ids or ((compute.device.index,) if compute.device.type == "cuda" else ())
    with torch.random.fork_rng(devices=cuda):  # dropout draws from the global generator
        torch.default_generator.manual_seed(settings.random_seed)
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(settings.random_seed)
        parts = TrainingParts(model, optimizer, scheduler, generator, cuda)
        saved = checkpoint.load() if checkpoint else None
        for number in range(parts.restore(saved) if saved else 0, settings.epochs):
            substitutes = twins(number) if twins is not None else None
            model.train()
            losses, hits, seen = [], torch.zeros((), dtype=torch.int64, device=images.device), 0
            for batch in batches_of(len(images), settings.batch_size, generator):
                batch = batch.to(images.device)
                pixels = images[batch]
                if substitutes is not None:
                    coin = torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5
                    pixels = torch.where(coin.to(images.device), substitutes[batch], pixels)
                # A teacher's images lie behind the others' channels, and so are cropped and flipped alike.
                moved = augment(pixels if teacher is None else torch.cat([pixels, images[batch]], 1), generator, facts)
                pixels, plain = moved[:, : images.shape[1]], moved[:, images.shape[1] :]
                with torch.autocast(compute.device.type, torch.bfloat16, enabled=bfloat16):
                    logits = parallel(to_unit(pixels).contiguous(memory_format=torch.channels_last))
                    loss = F.cross_entropy(logits, labels[batch])
                    if teacher is not None:
                        loss = loss + teacher(logits, plain, labels[batch])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach().float())
                predicted = logits.detach().argmax(1)
                hits += (predicted == labels[batch]).sum()
                after_predictions(batch, predicted)
                seen += len(batch)
                after_batch()
            scheduler.step()
            after_epoch(Epoch(number, len(losses), float(torch.stack(losses).double().mean()), int(hits) / seen))
            if checkpoint:
                checkpoint.save(parts.state(number + 1))


def _meets_faulty_kernel(model: nn.Module, image: Tensor) -> bool:
    """Whether a convolution with a kernel beyond 1x1 sees a one-pixel map on a CPU.

    The bfloat16 weight gradient of such a convolution (oneDNN in torch 2.15) is partly uninitialised memory.
    """
    seen: list[bool] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        seen.append(inputs[0][0, 0].numel() == 1 and max(module.kernel_size) > 1)

    if image.device.type != "cpu":
        return False
    handles = [module.register_forward_pre_hook(look) for module in model.modules() if isinstance(module, nn.Conv2d)]
    try:
        with frozen(model), torch.no_grad():
            model(to_unit(image))
    finally:
        for handle in handles:
            handle.remove()
    return any(seen)


def _scheduler(optimizer: torch.optim.Optimizer, settings: Settings) -> LRScheduler:
    """One step per epoch; the cosine ends with the last epoch really run (BB's T_max is 100 whatever is run)."""
    if settings.lr_scheduler == "StepLR":
        return StepLR(optimizer, settings.steplr_stepsize, settings.steplr_gamma)
    if settings.lr_scheduler == "MultiStepLR":
        return MultiStepLR(optimizer, list(settings.steplr_milestones), settings.steplr_gamma)
    return CosineAnnealingLR(optimizer, max(1, settings.epochs))
