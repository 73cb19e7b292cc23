"""Which images of a dataset an attack changes, how, and what they are called then (BB's rules)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from fmp_core.attacks import triggers
from fmp_core.attacks.settings import AttackSettings
from fmp_core.attacks.trigger_files import open_replacements, read_trigger
from fmp_core.data.datasets import Split
from fmp_core.data.images import Size
from fmp_core.data.write_record import PoisonedImages
from fmp_core.errors import UserError

ROWS = 1024  # images per call of a trigger function; bounds the memory of its float copies

# images uint8 [n, C, H, W] and their positions in the clean set, int64 [n] -> poisoned images
Stamp = Callable[[Tensor, Tensor], Tensor]


def make_stamp(settings: AttackSettings, size: Size, train: bool, total: int) -> Stamp:
    """The attack's trigger as a function, for the training or the test set of ``total`` images."""
    seed = settings.trigger_seed
    given = read_trigger(Path(settings.trigger_file), size) if settings.trigger_file else None
    if settings.attack == "badnet":
        side = settings.patch_size
        if side is not None and side > min(size[:2]):
            raise UserError(f"--patch_size is {side}, but the images are {size[0]}x{size[1]}.")
        own = triggers.bb_patch(size) if side is None else triggers.corner_patch(size, side)
        mask = own if given is None else given.clamp(0, 255).to(torch.uint8)
        if not mask.any():
            raise UserError(f"--trigger_file {settings.trigger_file} has no value above 0, so badnet would change no image.")
        return lambda images, _: triggers.badnet(images, mask)
    if settings.attack == "blended":
        picture = triggers.plaid(size, seed) if given is None else given
        return lambda images, _: triggers.blended(images, picture, settings.blend_alpha)
    if settings.attack == "lf":
        pattern = triggers.low_frequency_pattern(size, seed, settings.lf_amplitude) if given is None else given
        return lambda images, _: triggers.low_frequency(images, pattern)
    if settings.attack == "sig":
        return lambda images, _: triggers.sig(images, settings.sig_delta, settings.sig_f)
    if settings.attack == "wanet":
        field = triggers.warp_field(size, seed, settings.s, settings.k)
        return lambda images, _: triggers.wanet(images, field, rescale=settings.grid_rescale)
    replaced = settings.attack_train_replace_imgs_path if train else settings.attack_test_replace_imgs_path
    if replaced:
        encoded = open_replacements(Path(replaced), total, size)
        return lambda _, positions: torch.from_numpy(encoded[positions.numpy()]).permute(0, 3, 1, 2)
    return lambda images, _: triggers.sample_specific(images, settings.ssba_strength, seed)


def make_noise_stamp(settings: AttackSettings, size: Size) -> Stamp:
    """WaNet's noise mode: the warp plus noise that depends on ``trigger_seed`` and the image's position."""
    field = triggers.warp_field(size, settings.trigger_seed, settings.s, settings.k)
    start = (settings.trigger_seed + 1) * 0x9E3779B1  # far apart; torch's generator takes 32 bits of a seed
    return lambda images, positions: triggers.wanet(images, field, (positions + start) % 2**32, settings.grid_rescale)


def attack_labels(labels: Tensor, settings: AttackSettings, num_classes: int) -> Tensor:
    """The attacker's labels: the target, or the next class (BB ``backdoor_label_transform.py``); int64 ``[N]``."""
    if settings.attack_label_trans == "all2all":
        return (labels + 1) % num_classes
    return torch.full_like(labels, settings.attack_target)


def limit_train(total: int, limit: int | None, seed: int) -> Sequence[int]:
    """Positions of the images to train on: all ``total``, or ``limit`` of them by chance, sorted."""
    return range(total) if limit is None else sorted(random.Random(f"limit {seed}").sample(range(total), limit))


def choose_train(labels: Tensor, settings: AttackSettings, seed: int, used: Sequence[int]) -> list[int]:
    """Those of the positions ``used`` to poison, sorted: ``round(pratio * len(used))`` of them.

    Clean-label attacks draw from the target class only, but the ratio is of all ``used`` in both cases (BB
    ``backdoor_generate_poison_index.py``). The draw is not BB's, nor that of a clean subset (``choose_index.py``): with equal
    seeds a defender would own the poisoned images and no other. Raises UserError if that is not one image, or more than there
    are.
    """
    count, total = round(settings.pratio * len(used)), len(used)
    pool = [at for at in used if labels[at] == settings.attack_target] if settings.clean_label else used
    if settings.pratio > 0 and count == 0:
        raise UserError(f"--pratio {settings.pratio:g} of {total} training images is not even one; raise it.")
    if count > len(pool):
        raise UserError(
            f"--attack {settings.attack} poisons images of class {settings.attack_target} only, and --pratio "
            f"{settings.pratio:g} asks for {count} of {len(pool)}; at most {len(pool) / total:.4g} is possible."
        )
    return sorted(random.Random(f"poison {seed}").sample(pool, count))


def choose_test(labels: Tensor, settings: AttackSettings) -> list[int]:
    """Positions in the test set: all; for all2one those outside the target class, which need no backdoor to hit it."""
    wanted = torch.ones_like(labels) if settings.attack_label_trans == "all2all" else labels != settings.attack_target
    return torch.nonzero(wanted).flatten().tolist()


def _stamped(split: Split, positions: Sequence[int], stamp: Stamp) -> Tensor:
    parts = [positions[start : start + ROWS] for start in range(0, len(positions), ROWS)]
    done = [stamp(split.read(part), torch.tensor(part)) for part in parts]
    return torch.cat(done) if done else split.read([0])[:0]


@dataclass(frozen=True)
class Poison:
    """An attack on a dataset. ``cross`` are WaNet's noise-mode training images, which keep their labels."""

    train: PoisonedImages
    test: PoisonedImages
    cross: PoisonedImages | None = None

    def recorded_train(self) -> PoisonedImages:
        """What ``bd_train`` of a record holds: cross images count as poisoned there, as BB writes them (``wanet.py``)."""
        if self.cross is None:
            return self.train
        parts = (self.train, self.cross)
        rows = [row for part in parts for row in zip(part.indices, part.images, part.targets, part.original, strict=True)]
        indices, images, targets, original = zip(*sorted(rows, key=itemgetter(0)), strict=True)
        return PoisonedImages(self.train.total, indices, torch.stack(images), targets, original)


def poison(
    train_set: Split, test_set: Split, settings: AttackSettings, size: Size, num_classes: int, seed: int, used: Sequence[int]
) -> Poison:
    """Apply the attack ``settings`` to both sets; ``seed`` draws the training images, from those at ``used``. Raises UserError
    if there are too many or too few to poison, or a trigger file is not usable."""
    train_at, test_at = choose_train(train_set.labels, settings, seed, used), choose_test(test_set.labels, settings)
    if not test_at:
        raise UserError(f"All test images are of class {settings.attack_target}, so no attack could be measured.")

    def made(split: Split, positions: list[int], stamp: Stamp, keep_labels: bool = False) -> PoisonedImages:
        original = split.labels[torch.tensor(positions, dtype=torch.int64)]
        targets = original if keep_labels else attack_labels(original, settings, num_classes)
        return PoisonedImages(len(split), positions, _stamped(split, positions, stamp), targets.tolist(), original.tolist())

    bd_train = made(train_set, train_at, make_stamp(settings, size, True, len(train_set)))
    bd_test = made(test_set, test_at, make_stamp(settings, size, False, len(test_set)))
    cross = round(settings.cross_ratio * len(train_at)) if settings.attack == "wanet" else 0
    if not cross:
        return Poison(bd_train, bd_test)
    rest = sorted(set(used) - set(train_at))
    if cross > len(rest):
        raise UserError(f"--cross_ratio {settings.cross_ratio:g} asks for {cross} more images, but {len(rest)} are left.")
    cross_at = sorted(random.Random(f"cross {seed}").sample(rest, cross))
    return Poison(bd_train, bd_test, made(train_set, cross_at, make_noise_stamp(settings, size), keep_labels=True))
