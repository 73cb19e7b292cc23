"""run_defense.py: a script of a checkout finds everything BackdoorBench looks for, and leaves nothing but its results."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import bb_shims
import bb_workspace
import pytest
import run_defense
import torch
from conftest import RECORD, Ran
from fmp_core.errors import UserError
from test_install import tree

# Does what BackdoorBench's scripts do with paths and old names; none of its code.
SCRIPT = """
import argparse, os, sys
import numpy as np, torch
from settings import NAME  # beside config/, found through the current folder
parser = argparse.ArgumentParser()
for flag in ("dataset", "model", "result_file", "device", "fail"):
    parser.add_argument("--" + flag)
args = parser.parse_args()
path = f"record/{args.result_file}/attack_result.pt"
content = torch.load(path)
real = os.path.realpath(path)
data = real[:real.index("record")] + content["data_path"][content["data_path"].index("data"):]
assert os.path.isfile(data + "/cifar-10-batches-py/test_batch"), data
items = content["bd_test"]["bd_data_container"]["data_dict"].values()
assert items and all(os.path.isfile(item["path"]) for item in items)
assert np.infty == np.inf and np.float is float
assert torch.zeros_like(torch.ones(2), device="cuda").to("cuda:0").cuda().device.type == "cpu"
assert open("./config/defense/echo.yaml").read() == "x"
open("stray.txt", "w").close()  # into the temporary folder
print("ran with", args.dataset, args.model, NAME)
if args.fail:
    raise ValueError(args.fail)
torch.save({}, f"record/{args.result_file}/defense/echo/defense_result.pt")
"""

ANALYSIS = """
import os, sys
print(*sys.argv)
folder = "record/" + sys.argv[sys.argv.index("--result_file_defense") + 1]
os.mkdir(folder + "/visual")
open(folder + "/visual/plot.png", "w").close()
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "BackdoorBench"
    for name, text in {
        "defense/base.py": "",
        "defense/echo.py": SCRIPT,
        "utils/save_load_attack.py": "",
        "analysis/visual_names.py": ANALYSIS,
        "config/defense/echo.yaml": "x",
        "settings.py": "NAME = 'a name'",
        "record/other/attack_result.pt": "",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def run(checkout: Path, *flags: str, record: str = RECORD) -> int:
    fixed = ["--backdoorbench", str(checkout), "--defense", "echo", "--result_file", record, "--device", "cpu"]
    return run_defense.main([*fixed, *flags])


def test_a_defense_finds_record_and_data_and_leaves_only_its_results(
    checkout: Path, tiny_record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    renamed = tiny_record.rename(tiny_record.with_name("renamed"))  # its images are stored under the old name
    record, code = tree(renamed), tree(checkout)
    assert run(checkout, record="renamed") == 0
    results = renamed / "defense" / "echo"
    log = (results / "run_defense.log").read_text()
    assert "ran with cifar10 squeezenet1_0 a name" in log and log.endswith(" s\n") and "exit code 0" in log
    assert "echo ended after" in capsys.readouterr().out
    assert {path.name for path in results.iterdir()} == {"run_defense.log", "defense_result.pt"}
    assert run(checkout, "--analysis", "names", record="renamed") == 0
    assert "--result_file_defense renamed/defense/echo" in (results / "visual_names.log").read_text()
    assert (results / "visual" / "plot.png").is_file()
    assert tree(checkout) == code
    assert {key: value for key, value in tree(renamed).items() if not key.startswith("defense")} == record


def test_a_failure_is_reported_with_its_exit_code_and_last_error(
    checkout: Path, tiny_record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(checkout, "--", "--fail", "no such luck") == 1
    error = capsys.readouterr().err
    assert "echo did not run to its end: exit code 1 (ValueError: no such luck); see record" in error
    assert "exit code 1 after" in (tiny_record / "defense" / "echo" / "run_defense.log").read_text()


def test_what_backdoorbench_cannot_be_given_is_refused_before_it_starts(
    checkout: Path,
    tiny_record: Path,
    edit_record: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(checkout, "--defense", "nonsense") == 2
    assert "has no nonsense.py to run; there are echo" in capsys.readouterr().err
    assert run(checkout, "--analysis", "cm") == 2
    assert "has no visual_cm.py to run; there are names" in capsys.readouterr().err
    assert run(checkout, "--analysis", "names") == 2
    assert "to analyse; run the defense echo first" in capsys.readouterr().err
    assert run(checkout, "--python", "no/such/python") == 2
    assert "--python no/such/python is not a program" in capsys.readouterr().err
    (tiny_record / "defense" / "echo").rmdir()
    (tiny_record / "defense").rmdir()
    assert run(tiny_record) == 2
    assert "is not a BackdoorBench checkout" in capsys.readouterr().err
    edit_record(tiny_record, lambda content: content.update(extra=subprocess.Popen))  # BackdoorBench would unpickle anything
    assert run(checkout) == 2
    assert ".Popen, and a record may hold data only" in capsys.readouterr().err
    assert not (tiny_record / "defense").exists()


@pytest.mark.parametrize("stored", ["./no/such/place", "./data/../../cifar10"])
def test_stored_dataset_paths_stay_inside_the_workspace(
    checkout: Path, tiny_record: Path, edit_record: Callable[..., None], stored: str
) -> None:
    edit_record(tiny_record, lambda content: content.update(data_path=stored))
    job = bb_workspace.open_job(checkout, "record", RECORD, "data")
    with pytest.raises(UserError, match="BackdoorBench"), bb_workspace.workspace(job):
        pass


def test_a_log_that_is_a_link_out_of_the_record_is_refused(
    checkout: Path, tiny_record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny_record / "defense" / "echo").mkdir(parents=True)
    (tmp_path / "diary").write_text("dear")
    (tiny_record / "defense" / "echo" / "run_defense.log").symlink_to(tmp_path / "diary")
    assert run(checkout) == 2
    assert "leads out of the record" in capsys.readouterr().err and (tmp_path / "diary").read_text() == "dear"


def test_a_killed_or_silent_defense_is_no_success(tmp_path: Path) -> None:
    def code(exit_code: int, started: float | None) -> int:
        return run_defense.verdict("ft", bb_workspace.Ended(exit_code, 1.0, ""), tmp_path / "run_defense.log", started)[1]

    assert code(0, 0.0) == 1  # nothing written
    result = tmp_path / "defense_result.pt"
    torch.save({}, result)
    assert code(0, 0.0) == 0
    assert code(0, result.stat().st_mtime + 1) == 1  # an earlier run's
    assert code(-9, 0.0) == -9
    assert code(0, None) == 0  # an analysis writes no such file


def test_placeholders_stand_in_for_backdoorbench_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bb_shims.OPTIONAL, "absent_package", "absent-package")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, bb_shims._Placeholders(str(tmp_path))])
    use = "import absent_package.part as part\nfrom absent_package import thing\n"
    with pytest.raises(ModuleNotFoundError):
        exec(compile(use, "/elsewhere/library.py", "exec"), {})
    names: dict[str, Ran] = {}
    exec(compile(use, str(tmp_path / "utils.py"), "exec"), names)
    for call in ("thing()", "part.resize(1)", "thing.attribute"):
        with pytest.raises(ImportError, match="pip install absent-package"):
            exec(call, names)
    for name in ("absent_package", "absent_package.part"):
        sys.modules.pop(name, None)
