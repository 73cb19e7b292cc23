"""Which clean test image belongs to which poisoned one."""

from __future__ import annotations

import pytest
import torch
from fmp_core.errors import UserError
from fmp_core.inputs import paired_images
from fmp_core.models.evaluate import TestData as Data


def data(counterparts: list[int] | None, originals: list[int]) -> Data:
    """Four clean images, of which image ``i`` is all ``i`` and of class ``i``, and poisoned ones that are all 100 + row."""
    count = len(originals)
    clean = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 1, 2, 2)
    poisoned = (100 + torch.arange(count, dtype=torch.uint8))[:, None, None, None].expand(count, 1, 2, 2)
    rows = None if counterparts is None else torch.tensor(counterparts)
    return Data(clean, torch.arange(4), poisoned, torch.zeros(count, dtype=torch.int64), torch.tensor(originals), rows)


def test_pairs_are_of_the_same_image_and_labels() -> None:
    clean, poisoned, labels = paired_images(data([3, -1, 1, 2], [3, 0, 1, 0]), 9)  # the last one is labelled otherwise
    assert clean[:, 0, 0, 0].tolist() == [3, 1] and poisoned[:, 0, 0, 0].tolist() == [100, 102] and labels.tolist() == [3, 1]


def test_fewer_pairs_are_spread_evenly() -> None:
    _, poisoned, _ = paired_images(data([1, 2, 3, 0, 1], [1, 2, 3, 0, 1]), 3)
    assert poisoned[:, 0, 0, 0].tolist() == [100, 102, 104]


@pytest.mark.parametrize(("counterparts", "says"), [(None, "does not say"), ([-1, 0], "--test_images")])
def test_without_pairs_there_is_a_sentence(counterparts: list[int] | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        paired_images(data(counterparts, [0, 1]), 9)
