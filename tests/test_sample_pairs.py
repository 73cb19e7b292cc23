"""On a sample of the test images, too, each poisoned image knows the clean one that it was made from."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import RECORD
from fmp_core.inputs import load_inputs
from fmp_core.settings import Settings


def test_counterparts_are_rows_of_the_sample(workplace: Path) -> None:
    """The trigger covers the last three rows; the images are random, so that the others tell them apart."""
    test = load_inputs(Settings(test_images=5, epochs=0), RECORD, torch.device("cpu")).test
    assert len(test.clean_images) == len(test.poisoned_images) == 5 and test.counterparts is not None
    made_from = [
        [row for row, clean in enumerate(test.clean_images) if torch.equal(clean[:, :-3], image[:, :-3])]
        for image in test.poisoned_images
    ]
    assert [rows[0] if rows else -1 for rows in made_from] == test.counterparts.tolist()
    known = test.counterparts >= 0
    assert 0 < int(known.sum()) < 5
    assert torch.equal(test.clean_labels[test.counterparts[known]], test.originals[known])
