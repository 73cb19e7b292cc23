"""The command as a program, alone and beside BackdoorBench."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import QUICK, RESULTS, listing, refuses
from conftest import RECORD, Ran
from fmp_core.settings import PROJECT


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHONPATH", "COV_"))}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)


def test_the_script_runs_as_a_program_and_prints_one_line(workplace: Path):
    """A wrong flag is told before torch is loaded, which takes seconds; so is ``--help``."""
    before = listing(workplace)
    ran = python("-X", "importtime", str(PROJECT / "defense" / "fmp.py"), *QUICK, "--eps", "0", cwd=workplace)
    said = [line for line in ran.stderr.splitlines(keepends=True) if not line.startswith("import time:")]
    refuses(Ran(ran.returncode, ran.stdout, "".join(said)), "--eps is '0'")
    assert not {line.split("|")[-1].strip() for line in ran.stderr.splitlines()} & {"torch", "pandas", "matplotlib"}
    assert listing(workplace) == before


def test_the_class_is_imported_from_the_repository_root():
    ran = python("-c", "from defense.fmp import FMP; print(FMP.__mro__[1].__module__, FMP({'p': 3}).settings.p)", cwd=PROJECT)
    assert (ran.returncode, ran.stdout.split()) == (0, ["builtins", "3"]), ran.stderr


def test_of_two_installed_libraries_the_one_beside_the_script_counts(tmp_path: Path):
    (tmp_path / "fmp_core").mkdir()
    (tmp_path / "fmp_core" / "__init__.py").write_text("raise SystemExit('another one')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import defense.fmp, fmp_core; print(fmp_core.PROJECT)"
    ran = python("-c", code, cwd=PROJECT)
    assert (ran.returncode, ran.stdout.strip()) == (0, str(PROJECT)), ran.stderr


BASE = """
print("BackdoorBench's base is imported")

class defense(object):
    def __init__(self): print("BB's __init__")
    def add_arguments(parser): print("BB's add_arguments")
    def set_result(self): print("BB's set_result")
    def set_trainer(self): print("BB's set_trainer")
    def set_logger(self): print("BB's set_logger")
    def denoising(self): print("BB's denoising")
    def mitigation(self): print("BB's mitigation")
    def inhibition(self): print("BB's inhibition")
    def defense(self): print("BB's defense")
    def detect(self): print("BB's detect")
"""
ASK = """
import argparse
import defense.base, defense.fmp
parser = argparse.ArgumentParser()
defense.fmp.FMP.add_arguments(parser)
method = defense.fmp.FMP(parser.parse_args(["--p", "9"]))
print(isinstance(method, defense.base.defense), method.settings.p, hasattr(method, "detect"), defense.fmp.__file__)
"""


@pytest.fixture
def checkout(real_workplace_template: Path, tmp_path: Path) -> Path:
    """The shape of a BackdoorBench checkout with our files copied in."""
    root = tmp_path / "BackdoorBench"
    shutil.copytree(real_workplace_template, root)
    (root / "defense").mkdir()
    (root / "defense" / "__init__.py").touch()
    (root / "defense" / "base.py").write_text(BASE)
    shutil.copy(PROJECT / "defense" / "fmp.py", root / "defense")
    shutil.copytree(
        PROJECT / "defense" / "fmp_core", root / "defense" / "fmp_core", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(PROJECT / "config", root / "config")
    return root


def test_beside_backdoorbench_the_class_is_one_of_its_defenses(checkout: Path):
    ran = python("-c", ASK, cwd=checkout)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1].split() == ["True", "9", "True", str(checkout / "defense" / "fmp.py")]


def test_beside_backdoorbench_the_command_runs_like_its_own(checkout: Path):
    flags = ["--result_file", RECORD, "--device", "cpu", "--selection", "random", "--epochs", "0"]
    ran = python("defense/fmp.py", *flags, cwd=checkout)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("BackdoorBench's base is imported\n")
    assert (checkout / RESULTS / "defense_result.pt").is_file()
