"""Which folders collect.py takes for records, and tests of one attacked model that contradict each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from fmp_core.results.collect import collect
from result_files import metrics_json, write


@pytest.mark.parametrize("inside", [".", "one", "one/two"])
def test_records_inside_a_checkout_are_found(root: Path, tmp_path_factory: pytest.TempPathFactory, inside: str) -> None:
    """Its code lies in a folder ``defense``, as a record's results do, and its settings in ``config/defense``."""
    above = tmp_path_factory.mktemp("all")
    checkout = above / inside
    write(checkout / "defense" / "base.py", "")
    write(checkout / "config" / "defense" / "ft" / "config.yaml", "epochs: 1")
    write(checkout / "utils" / "defense" / "utils_dbr" / "helper.py", "")
    root.rename(checkout / "record")
    frame = collect(above, pytest.fail)
    assert set(frame["defense"]) >= {"no defense", "fmp", "ft"}
    assert {Path(source).name for source in frame[frame["defense"] == "no defense"]["source"]} >= {"badnet_cifar10"}


def test_each_test_of_its_own_is_a_row_of_its_own(root: Path) -> None:
    """The attack logged Acc 90; one run of ours measured 50, another 20: their DER is against these."""
    for name, before in (("fmp", 0.5), ("fmp-s1", 0.2)):
        file = root / "badnet_cifar10" / "defense" / name / "metrics.json"
        write(file, metrics_json(0.1, 0.02, 0.9, before_acc=before))
    said: list[str] = []
    rows = collect(root, said.append).set_index(["record", "defense"]).loc["badnet_cifar10"]
    assert rows.loc["no defense (our test, fmp)", "test_acc"] == 0.5
    assert rows.loc["no defense (our test, fmp-s1)", "test_acc"] == 0.2
    assert rows.loc["fmp", "acc_lost"] == pytest.approx(0.4) and rows.loc["fmp-s1", "acc_lost"] == pytest.approx(0.1)
    assert len(said) == 2 and "our test gave Acc 50.00" in said[0] and "our test gave Acc 20.00" in said[1]
