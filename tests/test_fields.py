"""Settings classes beyond flags: what a sweep file needs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from fmp_core.errors import UserError
from fmp_core.fields import REQUIRED, integer, list_of, mapping, parse_mapping, setting, text


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
