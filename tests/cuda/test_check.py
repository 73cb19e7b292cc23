"""``make test-cuda`` without a GPU, and what its table says of tests and figures."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import check_cuda
import pytest
from fmp_core.cuda_check import FULL, Checks, as_table, junit_counts, require_gpu
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


def test_failures_are_told_in_the_table(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(
        "<testsuites><testsuite><testcase name='good'/><testcase name='bad'><failure/></testcase>"
        "<testcase name='absent'><skipped/></testcase></testsuite></testsuites>"
    )
    assert junit_counts(tmp_path / "report.xml") == "1 passed, 1 failed (bad), 1 skipped"
    checks = Checks(FULL, tmp_path)
    failed = checks.row("a|b", lambda: str(checks.call("work", "-c", "print('reason\\n'); raise SystemExit(3)")))
    assert failed.passed is False and "exit code 3: reason" in failed.figures and str(tmp_path / "work.log") in failed.figures
    passed = checks.row("good", lambda: "7 maps")
    assert passed.passed and passed.figures.startswith("7 maps; ")
    table = as_table([failed, passed]).splitlines()
    assert "FAILED" in table[2] and "passed" in table[3] and all(line.count("|") == 4 for line in table)
