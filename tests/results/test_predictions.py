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
    again = read_predictions(tmp_path / "predictions.csv", DATA, 3)
    assert again is not None and again.equals(frame)
    other = TestData(IMAGES, torch.tensor([0, 1, 2, 0]), IMAGES[:3], DATA.targets, DATA.originals)
    assert read_predictions(tmp_path / "predictions.csv", other, 3) is None
    assert read_predictions(tmp_path / "nothing.csv", DATA, 3) is None


def test_confusion_and_success_are_counts():
    frame = prediction_frame(DATA, BEFORE, AFTER)
    assert confusion(frame, "before", False, 3).tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert confusion(frame, "after", True, 3).tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 1]]
    table = success_by_class(frame)
    assert table.index.tolist() == [1, 2] and table["images"].tolist() == [1, 2]
    assert table["before"].tolist() == [1, 1] and table["after"].tolist() == [0, 0.5]


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "poisoned,label,target,before,after\nFalse,0,-1,x,0\n", "{}"])
def test_a_damaged_table_is_named(tmp_path: Path, text: str):
    (tmp_path / "predictions.csv").write_text(text)
    with pytest.raises(UserError, match=r"predictions\.csv"):
        read_predictions(tmp_path / "predictions.csv", DATA, 3)


def test_classes_the_model_does_not_have_are_refused(tmp_path: Path):
    prediction_frame(DATA, BEFORE, AFTER).to_csv(tmp_path / "predictions.csv", index=False)
    with pytest.raises(UserError, match=r"outside 0\.\.1"):
        read_predictions(tmp_path / "predictions.csv", DATA, 2)
