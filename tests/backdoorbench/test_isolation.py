"""What BackdoorBench's process executes, writes and keeps: nothing of strangers, only in its results, and all it printed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import RECORD
from fmp_core.backdoorbench.run import run_on_record
from fmp_core.backdoorbench.workspace import _refuse_layout, open_job, workspace
from fmp_core.errors import UserError

ARGUMENTS = """
import argparse, os, shutil, sys
import torch
parser = argparse.ArgumentParser()
for flag in ("dataset", "model", "result_file", "device", "checkpoint_path"):
    parser.add_argument("--" + flag)
args = parser.parse_args()
results = f"record/{args.result_file}/defense/mine"
"""


class Calls:
    """Pickled, a call of ``touch`` for its file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.file,)


def run(checkout: Path, script: str, *extra: str, analysis: str | None = None) -> tuple[str, int]:
    (checkout / "defense" / "mine.py").write_text(ARGUMENTS + script)
    job = open_job(checkout, "record", RECORD, "data", "cpu")
    return run_on_record(job, "mine", analysis, sys.executable, list(extra))


def test_modules_in_the_folder_of_temporary_files_are_not_imported(
    checkout: Path, tiny_record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BackdoorBench's scripts look for modules in ``../`` and ``../../``, and anybody may write into /tmp."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary" / "planted.py").touch()
    (checkout / "own.py").touch()
    search = "sys.path += ['../', '../../']\nimport own\nprint('own')\nimport planted\nprint('planted')\n"
    message, code = run(checkout, search)
    assert code == 1 and "No module named 'planted'" in message
    assert "own\n" in (tiny_record / "defense" / "mine" / "run_defense.log").read_text()
    assert [path.name for path in (tmp_path / "temporary").iterdir()] == ["planted.py"]


def test_only_pickles_of_this_run_are_executed(checkout: Path, tiny_record: Path, tmp_path: Path) -> None:
    """ft-sam, npd and mcr take other models by flags or settings, perhaps a stranger's."""
    other = tiny_record / "defense" / "other"
    other.mkdir(parents=True)
    torch.save({"model": {"w": torch.ones(1)}}, other / "weights.pt")
    torch.save({"model": Calls(tmp_path / "called")}, other / "hostile.pt")
    script = (
        "folder = 'record/' + args.checkpoint_path\n"
        "print('read', torch.load(folder + '/weights.pt')['model'])\n"
        "torch.save({'model': argparse.Namespace(own=1)}, results + '/defense_result.pt')\n"
        "print('read', torch.load(results + '/defense_result.pt')['model'].own)\n"
        "torch.load(folder + '/hostile.pt')\n"
    )
    message, code = run(checkout, script, "--checkpoint_path", f"{RECORD}/defense/other")
    assert code == 1 and "UnpicklingError" in message and not (tmp_path / "called").exists()
    log = (tiny_record / "defense" / "mine" / "run_defense.log").read_text()
    assert "read {'w': tensor([1.])}" in log and "read 1" in log
    torch.load(other / "hostile.pt", weights_only=False)
    assert (tmp_path / "called").exists()  # the file does what it is to be kept from


@pytest.mark.parametrize("ends", [True, False])
def test_a_defense_that_removes_its_folder_keeps_its_log(ends: bool, checkout: Path, tiny_record: Path) -> None:
    """As mcr does. A log that is open then has no name any more."""
    script = "shutil.rmtree(results)\nos.makedirs(results)\nprint('went on')\n"
    script += "torch.save({}, results + '/defense_result.pt')\n" if ends else "raise ValueError('no luck')\n"
    message, code = run(checkout, script)
    assert code == (0 if ends else 1) and ("no luck" in message) != ends
    log = (tiny_record / "defense" / "mine" / "run_defense.log").read_text()
    assert "went on\n" in log and f"exit code {code} after" in log


def test_nothing_is_written_into_the_records_other_folders(checkout: Path, tiny_record: Path, tmp_path: Path) -> None:
    """BackdoorBench's network and quality draw into record/<name>/visual, which may be a link; nab writes beside it."""
    (tmp_path / "outside").mkdir()
    (tiny_record / "visual").symlink_to(tmp_path / "outside")
    (tiny_record / "nab").mkdir()
    place = "folder = 'record/' + sys.argv[sys.argv.index('--result_file_attack') + 1]\n"
    script = f"import sys\n{place}open(folder + '/visual/network.png', 'w').close()\n"
    (checkout / "analysis" / "visual_network.py").write_text(script)
    save = "torch.save({}, results + '/defense_result.pt')\n"
    seen = ["attack_result.pt", "bd_test_dataset", "bd_train_dataset", "defense"]
    assert run(checkout, f"{save}assert sorted(os.listdir('record/' + args.result_file)) == {seen}\n")[1] == 0
    torch.save({"model": {}}, tiny_record / "defense" / "mine" / "defense_result.pt")
    assert run(checkout, save, analysis="network")[1] == 0
    assert (tiny_record / "defense" / "mine" / "visual" / "network.png").exists()
    assert not list((tmp_path / "outside").iterdir()) and not list((tiny_record / "nab").iterdir())


def test_workers_are_forked(checkout: Path, tiny_record: Path) -> None:
    """Started anew, as Python 3.14 starts them, they cannot read BackdoorBench's datasets."""
    script = "import multiprocessing\nassert multiprocessing.get_start_method(allow_none=True) == 'fork'\n"
    assert run(checkout, script + "torch.save({}, results + '/defense_result.pt')\n")[1] == 0


@pytest.mark.parametrize(("method", "flag"), [("nc", "--log"), ("nab", "--checkpoint_save"), ("nab", "--log=x")])
def test_folders_that_would_be_lost_are_refused(method: str, flag: str, checkout: Path, tiny_record: Path) -> None:
    job = open_job(checkout, "record", RECORD, "data", "cpu")
    with pytest.raises(UserError, match=f"{flag.partition('=')[0]} cannot be used with {method}, which writes elsewhere"):
        run_on_record(job, method, None, sys.executable, [flag, "somewhere/"])


def test_a_layout_of_celeba_that_torchvision_would_download_is_refused(tmp_path: Path) -> None:
    (tmp_path / "celeba" / "img_align_celeba").mkdir(parents=True)
    for name in ("list_attr_celeba", "list_eval_partition"):  # enough for us
        (tmp_path / "celeba" / f"{name}.txt").touch()
    with pytest.raises(UserError, match=r"reads celeba from celeba/identity_CelebA.txt, which .* does not have"):
        _refuse_layout("celeba", tmp_path)
    for name in ("identity_CelebA", "list_bbox_celeba", "list_landmarks_align_celeba"):
        (tmp_path / "celeba" / f"{name}.txt").touch()
    _refuse_layout("celeba", tmp_path)
    with pytest.raises(UserError, match="reads imagenet from train"):
        _refuse_layout("imagenet", tmp_path)


def test_a_workspace_is_gone_with_all_around_it(
    checkout: Path, tiny_record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    with workspace(open_job(checkout, "record", RECORD, "data", "cpu")) as folder:
        assert tmp_path / "temporary" in folder.parents
    assert not list((tmp_path / "temporary").iterdir())
