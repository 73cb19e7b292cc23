"""The clean subset is BackdoorBench's, or the one an index file names."""

from __future__ import annotations

from pathlib import Path

import pytest
from fmp_core.data.clean_subset import choose_subset, in_mixed_order
from fmp_core.errors import UserError
from hypothesis import given
from hypothesis import strategies as st


def index_file(folder: Path, text: str) -> str:
    path = folder / "index.txt"
    path.write_text(text)
    return str(path)


def test_the_draw_is_backdoorbenchs():
    subset = choose_subset(50000, 0.05, 0, None)  # facts observed with BB's own ft, anp, nad
    assert len(subset) == 2500
    assert subset[:5] == [25247, 49673, 27562, 2653, 16968]


@given(st.integers(1, 500), st.floats(0.01, 1), st.integers(0, 5))
def test_a_draw_is_distinct_and_in_range(total: int, ratio: float, seed: int):
    if int(total * ratio) == 0:
        with pytest.raises(UserError, match="--ratio"):
            choose_subset(total, ratio, seed, None)
        return
    subset = choose_subset(total, ratio, seed, None)
    assert len(set(subset)) == len(subset) == int(total * ratio)
    assert 0 <= min(subset) <= max(subset) < total


def test_seeds_differ_and_a_seed_repeats():
    draws = [choose_subset(1000, 0.1, seed, None) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_an_index_file_is_kept_in_its_order(tmp_path: Path):
    assert choose_subset(50, 0.1, 0, index_file(tmp_path, "7\n3\n49\n0\n")) == [7, 3, 49, 0]


def test_a_one_line_index_file_is_one_image(tmp_path: Path):
    assert choose_subset(50, 0.1, 0, index_file(tmp_path, "7")) == [7]


def test_blank_lines_spaces_and_numpys_floats_are_read(tmp_path: Path):
    assert choose_subset(50, 0.1, 0, index_file(tmp_path, "\n 7 \n\n1.200000000000000000e+01\r\n\n")) == [7, 12]


@pytest.mark.parametrize(
    "text, says",
    [
        ("1\n50\n", "image 50, but the clean training set has images 0..49"),
        ("-1\n", "image -1"),
        ("4\n5\n4\n", "names an image twice"),
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("1\nseven\n", "line 2 is 'seven'"),
        ("1.5\n", "line 1 is '1.5'"),
        ("nan\n", "line 1 is 'nan'"),
        ("inf\n", "line 1 is 'inf'"),
        ("1 2 3\n", "line 1 is '1 2 3'"),
    ],
)
def test_a_wrong_index_file_is_refused_with_the_reason(text: str, says: str, tmp_path: Path):
    path = index_file(tmp_path, text)
    with pytest.raises(UserError) as caught:
        choose_subset(50, 0.1, 0, path)
    assert f"--index {path}" in str(caught.value) and says in str(caught.value)


def test_a_missing_index_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"gone\.txt does not exist; name a text file"):
        choose_subset(50, 0.1, 0, str(tmp_path / "gone.txt"))
    with pytest.raises(UserError, match=r" is a folder; name a text file"):
        choose_subset(50, 0.1, 0, str(tmp_path))


def test_a_binary_index_file_is_refused(tmp_path: Path):
    (tmp_path / "index.bin").write_bytes(b"\xff\x00\xfe")
    with pytest.raises(UserError, match="not a text file"):
        choose_subset(50, 0.1, 0, str(tmp_path / "index.bin"))


def test_images_that_come_class_by_class_are_mixed() -> None:
    """The first are for FRG, the last for testing triggers; an order that is mixed already, as of a draw, stays."""
    labels = [number // 40 for number in range(200)]
    ordered = list(range(0, 400, 2))
    mixed = in_mixed_order(ordered, labels, 0)
    assert mixed != ordered and sorted(mixed) == ordered and mixed == in_mixed_order(ordered, labels, 0)
    assert {labels[position // 2] for position in mixed[:32]} == set(range(5)) == {labels[place // 2] for place in mixed[-32:]}
    again = [labels[position // 2] for position in mixed]
    assert in_mixed_order(mixed, again, 1) == mixed
    assert in_mixed_order(ordered[::-1], labels[::-1], 0) != ordered[::-1]
    assert in_mixed_order([5, 3], [1, 1], 0) == [5, 3] and in_mixed_order([7], [0], 0) == [7]


def test_a_part_that_comes_class_by_class_is_enough_to_mix() -> None:
    """FRG scores the first images and triggers are tested on the last ones, whatever lies between."""
    mixed, by_class = list(range(10)) * 60, [label for label in range(10) for _ in range(60)]
    for labels in (mixed + by_class, by_class + mixed):
        subset = in_mixed_order(list(range(1200)), labels, seed=0)
        assert subset != list(range(1200)) and sorted(subset) == list(range(1200))
        assert len({labels[place] for place in subset[:32]}) > 5 and len({labels[place] for place in subset[-256:]}) == 10
    assert in_mixed_order(list(range(600)), mixed, seed=0) == list(range(600))


@pytest.mark.parametrize(
    ("images", "changes", "expected"),
    [
        (256, 110, "mixed"),  # of 255 neighbours 229.5 would differ in a random order; half of them are 114.75
        (256, 122, "as it is"),
        (36, 5, "mixed"),  # six classes: of 35 neighbours 29.2 would differ; that 5 do is 4.5 standard deviations away
        (36, 10, "as it is"),  # ten classes: 31.1 would differ; that 10 do, less than half, is 3.8 away
    ],
)
def test_classes_may_come_in_runs_that_chance_may_make(images: int, changes: int, expected: str) -> None:
    """Ten classes (six where there are six runs); the class changes ``changes`` times, evenly over all images."""
    runs = [position * (changes + 1) // images for position in range(images)]
    labels = [run % 10 for run in runs]
    order = list(range(images))
    assert (in_mixed_order(order, labels, seed=0) == order) == (expected == "as it is")
