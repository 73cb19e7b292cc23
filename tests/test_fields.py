"""Settings classes beyond flags: what a sweep file needs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from fmp_core.errors import UserError
from fmp_core.fields import (
    DEVICE,
    NAME,
    REQUIRED,
    integer,
    list_of,
    mapping,
    parse_mapping,
    read_yaml_mapping,
    setting,
    text,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    records: list[str] = setting(REQUIRED, list_of(text()), "names")
    workers: int = setting(1, integer(1), "jobs at once")
    slurm: dict[str, Any] = setting(dict, mapping("partition"), "sbatch")


def test_a_mapping_becomes_values():
    values = parse_mapping(Plan, {"records": ["a"], "workers": "2", "slurm": {"partition": "gpu"}}, "File x")
    assert Plan(**values) == Plan(["a"], 2, {"partition": "gpu"})
    assert Plan(["a"]).slurm == {}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "File x has no records, which must be a list with at least one entry."),
        ({"records": []}, "File x: records is [], but must be a list with at least one entry."),
        ({"records": "a"}, "File x: records is 'a', but must be a list with at least one entry."),
        ({"records": ["a"], "workers": 0}, "File x: workers is 0, but must be a whole number of at least 1."),
        ({"records": ["a"], "slurm": {"gpu": 1}}, "but must be 'key: value' lines with the keys partition."),
        (
            {"record": ["a"]},
            "File x has the unknown key 'record' (did you mean records?); known keys: records, workers, slurm.",
        ),
    ],
)
def test_what_does_not_fit_is_named(content: dict[str, Any], says: str):
    with pytest.raises(UserError) as caught:
        parse_mapping(Plan, content, "File x")
    assert says in str(caught.value)


def test_the_home_of_a_path_is_found_where_shells_leave_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert text("FOLDER").parse("~/results") == text("FILE").parse("/home/me/results") == "/home/me/results"
    assert text().parse("~/results") == "~/results"


def test_numbers_in_yaml_are_what_they_are_as_flags(tmp_path: Path):
    """YAML 1.1 takes 0123 for 83 and 1:30 for 90."""
    path = tmp_path / "x.yaml"
    path.write_text("a: 0123\nb: 1:30\nc: -12\nd: 1.5\ne: 1e-3\nf: 0\ng: .5e+1\nh: 0x10\ni: 1:30.5\nj: 007\n")
    content = read_yaml_mapping(path, "File")
    texts = {"a": "0123", "b": "1:30", "e": "1e-3", "h": "0x10", "i": "1:30.5", "j": "007"}
    assert content == {**texts, "c": -12, "d": 1.5, "f": 0, "g": 5.0} and integer(0).parse(content["a"]) == 123
    for wrong in (content["b"], content["h"]):
        with pytest.raises(ValueError, match="invalid literal"):
            integer(0).parse(wrong)


def test_yes_is_no_name():
    assert NAME.parse("yes") == "yes" and DEVICE.parse("auto") == "auto"
    with pytest.raises(ValueError):
        NAME.parse(True)
