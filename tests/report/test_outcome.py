"""What the page shows of a run, read back: each figure is in its own cell, or drawn under its own name."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from drawn import figures_written
from fmp_core.report import page as page_module
from fmp_core.report.data import Trigger
from fmp_core.report.figures import MOST_OPAQUE, confusion_matrix, success_by_class
from fmp_core.report.page import page
from made_runs import made_run, predictions, scored_maps

CLASSES = 3
COMPARED = {"ft": {"test_acc": 0.85, "test_asr": 0.25, "test_ra": 0.6}}


class Page(NamedTuple):
    """The HTML, and for each chart with lines {label: points}."""

    text: str
    lines: list[dict[str, list[list[float]]]]

    def rows(self, table: str) -> dict[str, list[str]]:
        """Of the first table of class ``table``: name of the row -> the figures in its cells, without their limits."""
        body = re.search(rf'<table class="{table}">(.*?)</table>', self.text, re.DOTALL)[1].replace("\u2212", "-")
        named = re.findall(r'<tr[^>]*>\s*<th scope="row">([^<]*)(.*?)</tr>', body, re.DOTALL)
        return {name: re.findall(r"<td>(?:<strong>)?([^<]*)", cells) for name, cells in named}


@pytest.fixture(scope="module")
def made() -> Page:
    """Of 20 clean images of class 1, and as many triggered ones towards class 0."""
    run = made_run(scored_maps({"a": [1, 2, 8, 9]}), predictions((0.8, 0.1), (0.9, 0.95), images=20), settings={"p": 2})
    with figures_written() as figures:
        text = page(run, CLASSES, None, "", COMPARED)
    charts = [figure.axes[0].lines for figure in figures if figure.axes[0].lines]
    return Page(text, [{str(line.get_label()): line.get_xydata().round(6).tolist() for line in lines} for lines in charts])


def test_changes_are_after_minus_before(made: Page) -> None:
    assert made.rows("outcome") == {
        "Acc": ["90.00", "80.00", "-10.00"],
        "ASR": ["95.00", "10.00", "-85.00"],
        "RA": ["5.00", "90.00", "+85.00"],
        "DER": ["", "87.50", ""],
    }


def test_what_is_compared_is_rated_by_the_attack_it_stops(made: Page) -> None:
    assert made.rows("numbers") == {
        "fmp": ["80.00", "10.00", "90.00", "87.50"],
        "ft": ["85.00", "25.00", "60.00", "82.50"],  # ASR fell by 70 points, Acc by 5
    }


@pytest.mark.parametrize(
    ("kind", "when", "named"),
    [
        ("clean", "before", [0, 18, 2]),
        ("clean", "after", [0, 16, 4]),
        ("triggered", "before", [19, 1, 0]),
        ("triggered", "after", [2, 18, 0]),
    ],
)
def test_a_matrix_is_of_the_images_and_the_model_that_its_title_names(
    made: Page, kind: str, when: str, named: list[int]
) -> None:
    counts = np.array([[0] * CLASSES, named, [0] * CLASSES])
    svg = confusion_matrix(counts, f"Confusion matrix of {kind} test images {when} the defense")
    (shown,) = re.findall(rf"<figcaption>{kind.capitalize()} images, {when}</figcaption>(.*?)</figure>", made.text, re.DOTALL)
    assert shown.split() == svg.split()


def test_dots_of_a_class_are_its_attack_success_before_and_after(made: Page) -> None:
    assert {"before": [[95, 0]], "after": [[10, 0]]} in made.lines


def test_epoch_0_of_the_curves_is_the_attacked_model(made: Page) -> None:
    """And epoch 1 the first of fine-tuning, whose models were not tested here."""
    attacked = [[0, 50]]
    assert {"train Acc": [[1, 50], [2, 60]], **dict.fromkeys(("Acc", "RA", "ASR"), attacked)} in made.lines
    assert {"train": [[1, 1.0], [2, 0.9]]} in made.lines


def test_cells_are_shares_of_the_true_class() -> None:
    with figures_written() as figures:
        confusion_matrix(np.array([[3, 1], [0, 4]]), "x")
    (axes,) = figures[0].axes
    assert {text.get_position(): text.get_text() for text in axes.texts} == {(0, 0): "75", (1, 0): "25", (1, 1): "100"}
    assert (np.asarray(axes.images[0].get_array())[..., 3] / MOST_OPAQUE).tolist() == [[0.75, 0.25], [0, 1]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")


def test_of_many_classes_those_of_highest_success_are_shown() -> None:
    with figures_written() as figures:
        success_by_class(pd.DataFrame({"before": 1.0, "after": [number / 40 for number in range(40)]}))
    labels = figures[0].axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == [str(number) for number in range(10, 40)]


def test_precision_stands_beside_that_of_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight maps two are pruned, one of them among the two that the trigger changes most."""
    run, nothing = made_run(scored_maps({"a": [1, 2, 8, 9, 10, 11, 12, 13]}), settings={"p": 4}), torch.zeros(0)
    tac = torch.tensor([8, 1, 7, 2, 3, 4, 5, 6], dtype=torch.float64)
    unused: Any = None
    trigger = Trigger(unused, run.layers, nothing, nothing, nothing, tac)
    monkeypatch.setattr(page_module, "pictures", lambda _run, _trigger: None)
    text = page(run, CLASSES, trigger, "", {})
    assert [figure.strip() for figure in re.findall(r"<dd>([^<]*)", text)] == ["1", "50.0 %", "25.0 %", "50"]
    row = re.search(r'<th scope="row">4<small>this run</small></th>(.*?)</tr>', text, re.DOTALL)[1]
    assert re.findall(r"<td>([^<]*)", row) == ["2", "0", "1", "50.0", "25.0", "0.464"]
