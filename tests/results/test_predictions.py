"""The table of predictions: written, read back, counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fmp_core.errors import UserError
from fmp_core.models.evaluate import Predictions, TestData
from fmp_core.results.predictions import confusion, prediction_frame, read_predictions, success_by_class

IMAGES = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
DATA = TestData(IMAGES, torch.tensor([0, 1, 2, 2]), IMAGES[:3], torch.tensor([0, 0, 0]), torch.tensor([1, 2, 2]))
BEFORE = Predictions(torch.tensor([0, 1, 2, 1]), torch.tensor([0, 0, 0]))
AFTER = Predictions(torch.tensor([0, 1, 2, 2]), torch.tensor([1, 0, 2]))


def test_what_is_written_is_read_back(tmp_path: Path):
    frame = prediction_frame(DATA, BEFORE, AFTER)
    frame.to_csv(tmp_path / "predictions.csv", index=False)
    text = (tmp_path / "predictions.csv").read_text().splitlines()
    assert text[0] == "poisoned,label,target,before,after" and text[1] == "False,0,-1,0,0" and text[5] == "True,1,0,0,1"
    assert read_predictions(tmp_path / "predictions.csv", 3).equals(frame)


def test_confusion_and_success_are_counts():
    frame = prediction_frame(DATA, BEFORE, AFTER)
    assert confusion(frame, "before", False, 3).tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert confusion(frame, "after", True, 3).tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 1]]
    table = success_by_class(frame)
    assert table.index.tolist() == [1, 2] and table["images"].tolist() == [1, 2]
    assert table["before"].tolist() == [1, 1] and table["after"].tolist() == [0, 0.5]


HEAD = "poisoned,label,target,before,after\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read"),
        ("", "cannot be read"),
        ("a,b\n1,2\n", "has no column poisoned"),
        (HEAD + "True,0,1,0,0\n", "which images are poisoned"),
        (HEAD + "False,0,-1,x,0\nTrue,1,0,0,0\n", "outside"),
        (HEAD + "False,0,-1,0,0\nTrue,1,0,0,-1\n", "outside"),
        (HEAD + "False,0,-1,0,0\nTrue,1,0,0,3\n", "outside 0..2"),
    ],
)
def test_a_missing_or_damaged_table_is_named(tmp_path: Path, text: str | None, says: str):
    if text is not None:
        (tmp_path / "predictions.csv").write_text(text)
    with pytest.raises(UserError, match=rf"predictions\.csv.*{says}"):
        read_predictions(tmp_path / "predictions.csv", 3)
