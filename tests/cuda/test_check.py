"""``make test-cuda`` without a GPU, and what its table says of tests and figures."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import check_cuda
import pytest
from fmp_core import cuda_check
from fmp_core.cuda_check import Checks, as_table, require_gpu
from fmp_core.errors import UserError
from fmp_core.settings import PROJECT


def has_gpu() -> bool:
    try:
        require_gpu()
    except UserError:
        return False
    return True


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_sentence_and_nothing_is_installed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = {
        name: value for name, value in os.environ.items() if name not in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")
    }  # of make test
    command = ["make", "test-cuda", "PYTHON=python3"]
    ran = subprocess.run(command, cwd=PROJECT, env=alone, capture_output=True, text=True)
    assert ran.returncode == 2 and not ran.stdout
    sentence, *rest = ran.stderr.splitlines()
    assert sentence.startswith("check_cuda: There is no CUDA device") and all(line.startswith("make: ") for line in rest)
    assert check_cuda.main(["--probe"]) == 2 and check_cuda.main(["--folder", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()


def test_failures_are_told_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_check, "PROJECT", tmp_path)  # its tests are these
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert False\ndef test_absent(): pytest.skip()\n"
    )
    checks = Checks(tmp_path)
    failed = checks.row("a|b", checks.test)
    assert failed.passed is False and str(tmp_path / "tests.log") in failed.figures
    assert "exit code 1: " in failed.figures and "1 failed, 1 passed, 1 skipped" in failed.figures
    assert "(test_bad)" in failed.figures
    passed = checks.row("good", lambda: checks.test("-k", "good"))
    assert passed.passed and "1 passed" in passed.figures and passed.figures.endswith(" s in all")
    table = as_table([failed, passed]).splitlines()
    assert "FAILED" in table[2] and "passed" in table[3] and all(line.count("|") == 4 for line in table)
