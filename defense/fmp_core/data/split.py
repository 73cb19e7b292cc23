"""A training or test set whose images are read on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fmp_core.data.images import Size, read_images


@dataclass(frozen=True)
class Split:
    """A training or test set: ``labels`` int64 ``[N]``; ``read(indices)`` gives uint8 ``[n, C, H, W]``."""

    labels: Tensor
    read: Callable[[Sequence[int]], Tensor]

    def __len__(self) -> int:
        return len(self.labels)


def file_split(paths: Sequence[Path], labels: Sequence[int], size: Size) -> Split:
    """Image files and their labels."""
    return Split(
        torch.tensor(labels, dtype=torch.int64),
        lambda indices: read_images([paths[int(i)] for i in indices], size),
    )
