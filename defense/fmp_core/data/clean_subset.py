"""The clean subset: which images of the clean training set the defender owns (BB ``utils/choose_index.py``)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from fmp_core.errors import UserError, what_is_there
from fmp_core.settings import Settings

HELD_OUT = 256  # clean images, the last ones, that triggers are tested on and never inverted on; half of a smaller subset
LARGEST_INDEX_FILE = 64 * 2**20  # bytes of an index file; ImageNet's 1.3 million indices take 10 MB


def choose_subset(total: int, ratio: float, seed: int, index_file: str | None) -> list[int]:
    """Positions in the clean training set, in draw order.

    Without ``index_file`` the draw is BB's: ``random.sample`` of ``int(total*ratio)`` positions after seeding.

    Raises:
        UserError: the file is missing, holds anything but distinct indices in 0..total-1, or the subset is empty.
    """
    if index_file is not None:
        return _read_index(index_file, total)
    count = int(total * ratio)
    if count == 0:
        raise UserError(f"--ratio {ratio:g} of {total} clean training images is not even one image; raise --ratio.")
    return random.Random(seed).sample(range(total), count)


def in_mixed_order(subset: list[int], labels: Sequence[int], seed: int) -> list[int]:
    """``subset`` as it is, or in an order drawn by ``seed`` if its images, of the classes ``labels``, come class by class.

    FRG scores the first images and triggers are tested on the last ones; either should be of all classes. Images come class by
    class if, among the first or the last, neighbours differ in class less than half as often as in a random order, and so
    seldom that it is no chance.
    """
    shares = [count / len(labels) for count in Counter(labels).values()]
    differing = 1 - sum(share**2 for share in shares)
    for part in (labels[: int(Settings().frg_samples)], labels[:HELD_OUT], labels[-HELD_OUT:]):
        expected, seen = (len(part) - 1) * differing, sum(a != b for a, b in pairwise(part))
        if seen < expected / 2 and expected - seen > 4 * expected**0.5:  # four standard deviations
            return random.Random(seed).sample(subset, len(subset))
    return subset


def _read_index(path: str, total: int) -> list[int]:
    file = Path(path)
    try:
        if not file.is_file():
            raise UserError(f"--index {path} {what_is_there(file)}; name a text file with one index a line.")
        if file.stat().st_size > LARGEST_INDEX_FILE:
            raise UserError(f"--index {path} is larger than {LARGEST_INDEX_FILE >> 20} MiB, which no list of indices is.")
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--index {path} cannot be read ({getattr(error, 'strerror', None) or 'not a text file'}).") from None
    indices = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                indices.append(int(float(line)) if float(line).is_integer() else int(line))
        except (ValueError, OverflowError):
            raise UserError(f"--index {path} line {number} is {line[:40]!r}, not an index of a training image.") from None
    bad = next((i for i in indices if not 0 <= i < total), None)
    if bad is not None:
        raise UserError(f"--index {path} names image {bad}, but the clean training set has images 0..{total - 1}.")
    if not indices or len(set(indices)) < len(indices):
        raise UserError(
            f"--index {path} {'is empty' if not indices else 'names an image twice'}; give one distinct index a line."
        )
    return indices
