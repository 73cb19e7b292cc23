"""Nothing in a stranger's file runs; each is refused in one sentence, quickly, in bounded memory, leaving no file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fmp_core.errors import UserError
from fmp_core.results.read import read_record
from hostile import corpus
from hostile_files import RECORD, Case

CASES = corpus()
GOOD = "a whole record, and a log folder that is a file"  # warms up: what is imported later was not imported for a good reason
FLAGS = ["--device", "cpu", "--result_file", RECORD, "--epochs", "0", "--frg_samples", "1"]


def listing(root: Path) -> dict[str, tuple[int, int]]:
    found = {path: path.lstat() for path in root.rglob("*")}
    return {str(path): (facts.st_mode, facts.st_size) for path, facts in found.items()}


@pytest.fixture(scope="session")
def workplace_template(real_workplace_template: Path) -> Path:
    """Another process reads the record."""
    return real_workplace_template


@pytest.fixture(scope="module")
def report_of(workplace_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What the command said of a case, and what it left behind. One process runs a half of the corpus, on first use."""
    names = list(CASES)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]

    @cache
    def reports(half: int) -> dict[str, dict[str, Any]]:
        good = Case(lambda root: None, "", ("--log", "data/cifar10/cifar-10-batches-py/test_batch"))
        return run_watched({GOOD: good, **{name: CASES[name] for name in halves[half]}}, workplace_template, tmp_path_factory)

    return lambda name: reports(int(name in halves[1]))[name]


def run_watched(
    cases: dict[str, Case], workplace_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("hostile")
    todo, before = [], {}
    for number, (name, case) in enumerate(cases.items()):
        place = root / str(number)
        shutil.copytree(workplace_template, place)
        case.damage(place)
        before[name] = listing(place)
        todo.append((name, str(place), [*FLAGS, *case.flags]))
    (root / "cases.json").write_text(json.dumps(todo))
    command = [sys.executable, str(Path(__file__).with_name("watched.py")), str(root / "cases.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    found = {report["name"]: report for report in map(json.loads, done.stdout.splitlines())}
    assert len(found) == len(todo), f"the process ended ({done.returncode}) at {todo[len(found)][0]!r}: {done.stderr[-800:]}"
    for name, place, _ in todo:
        found[name]["changed"] = sorted(set(listing(Path(place)).items()) ^ set(before[name].items()))
        shutil.rmtree(place)
    return found


def test_the_corpus_is_large():
    assert len(CASES) >= 160


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_input_is_refused_in_one_sentence_and_nothing_happens(name: str, report_of: Callable[[str], dict[str, Any]]):
    report = report_of(name)
    assert report["code"] == 2, report
    assert report["out"] == "" and report["err"].startswith("fmp: ") and report["err"].count("\n") == 1, report
    assert report["err"].rstrip("\n").isprintable() and len(report["err"]) < 2000
    assert CASES[name].says in report["err"]
    assert report["events"] == [] and report["changed"] == [], report
    assert {module.split(".")[0] for module in report["modules"]} <= {"PIL", "encodings"}
    assert report["seconds"] < 60, report  # of processor time; it is a tenth of one
    assert report["kilobytes"] < 2**20  # one GiB, Python and torch included


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("call: ", "pickle: "))])
def test_collecting_reads_a_hostile_info_pickle_as_unreadable(name: str, workplace_template: Path, tmp_path: Path):
    """``collect.py`` reads the attack's settings with the same reader: one warning, and the other records go on."""
    (tmp_path / "record" / RECORD).mkdir(parents=True)
    shutil.copy(workplace_template / "record" / RECORD / "attack_result.pt", tmp_path / "record" / RECORD)
    CASES[name].damage(tmp_path)
    (tmp_path / "record" / RECORD / "attack_result.pt").rename(tmp_path / "record" / RECORD / "info.pickle")
    with pytest.raises(UserError, match=r"info\.pickle") as caught:
        read_record(tmp_path / "record" / RECORD)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "pwned").exists() and not Path("pwned").exists()


def test_the_corpus_is_hostile(workplace_template: Path, tmp_path: Path):
    """Payloads do work where they are run; else their refusal would prove nothing."""
    import torch

    for name in ("call: os.system", "call: eval", "call: torch bytes", "call: Popen"):
        shutil.copytree(workplace_template, tmp_path / name)
        CASES[name].damage(tmp_path / name)
        os.chdir(tmp_path / name)
        assert not Path("pwned").exists()
        torch.load("record/badnet_tiny/attack_result.pt", weights_only=False)
        for _ in range(100):
            if Path("pwned").exists():
                break
            __import__("time").sleep(0.1)
        assert Path("pwned").exists(), name
