"""Into a checkout and out again, whatever is in the way and whenever it is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import install as script
import pytest
from fmp_core.backdoorbench.install import COMMIT, OWN_FOLDER, PROJECT, UNITS, install, uninstall
from fmp_core.errors import UserError
from fmp_core.system.versions import git_hash

Tree = Callable[[Path], dict[str, str | None]]


def git(root: Path, *words: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    return subprocess.run(["git", "-C", str(root), *identity, *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(checkout: Path) -> Path:
    """The checkout as a git repository, as BackdoorBench's is."""
    git(checkout, "init", "-q")
    git(checkout, "add", "-A")
    git(checkout, "commit", "-qm", "as found")
    return checkout


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A project of five small files in our layout."""
    source = tmp_path / "project"
    for name in ("defense/fmp.py", "defense/fmp_core/a.py", "defense/fmp_core/b/c.py", "config/defense/fmp/d.yaml"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(f"# {name}\n")
    (source / "record_scripts").mkdir()
    (source / "record_scripts" / "e.py").write_text("# e\n")
    return source


def python(root: Path, code: str) -> str:
    """Run code from the checkout as a user would, compiled files and all."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")}
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True)
    return ran.stdout.strip()


@pytest.mark.parametrize("link", [False, True])
def test_installed_fmp_is_a_defense_of_the_checkout_and_leaves_no_trace(repository: Path, tree: Tree, link: bool) -> None:
    before = tree(repository)
    assert script.main(["--into", str(repository), *(["--link"] if link else [])]) == 0
    assert (repository / "defense" / "fmp_core").is_symlink() == link
    if not link:
        for unit in UNITS:
            for path in [PROJECT / unit, *(PROJECT / unit).rglob("*")]:
                if path.is_file() and "__pycache__" not in path.parts:
                    assert (repository / path.relative_to(PROJECT)).read_bytes() == path.read_bytes()
    code = """
import sys
sys.path[:0] = ["", "defense"]  # ours may be installed in this Python, too
from defense.fmp import FMP
import defense.base as b, fmp_core.system.versions as c
print(issubclass(FMP, b.defense), b.__file__, c.__file__, c.git_hash())
"""
    own = repository / "defense" / "fmp_core" / "system" / "versions.py"
    expected = ["True", str(repository / "defense" / "base.py"), str(own), git_hash()]
    assert python(repository, code).split() == expected, "the commit must be ours, not BackdoorBench's"
    assert (repository / "defense" / "__pycache__").is_dir()
    assert script.main(["--into", str(repository), "--uninstall"]) == 0
    assert tree(repository) == before
    assert git(repository, "status", "--porcelain", "--ignored") == ""


def test_a_copy_without_its_commit_file_knows_none(repository: Path, small: Path) -> None:
    shutil.copytree(PROJECT / "defense" / "fmp_core" / "system", small / "defense" / "fmp_core" / "system")
    install(repository, small)
    (repository / COMMIT).unlink()
    code = "import runpy; print(runpy.run_path('defense/fmp_core/system/versions.py')['git_hash']())"
    assert python(repository, code) == "unknown"


@pytest.mark.parametrize("place", ["defense/fmp.py", "record_scripts/e.py", "config/defense/fmp"])
def test_foreign_files_are_never_overwritten(checkout: Path, small: Path, tree: Tree, place: str) -> None:
    foreign = checkout / place
    foreign.parent.mkdir(parents=True, exist_ok=True)
    foreign.write_text("someone else's")
    before = tree(checkout)
    with pytest.raises((UserError, OSError)):
        install(checkout, small, link=place == "config/defense/fmp", force=True)
    assert tree(checkout) == before


def test_files_behind_a_link_are_not_the_checkouts(checkout: Path, small: Path, tree: Tree) -> None:
    install(checkout, small)
    shutil.rmtree(checkout / "record_scripts")
    (checkout / "record_scripts").symlink_to(small / "record_scripts")
    before = tree(small)
    with pytest.raises(UserError, match=r"record_scripts/e\.py .* did not come from this installer"):
        uninstall(checkout, force=True)
    assert tree(small) == before


def test_an_update_replaces_adds_and_removes(checkout: Path, small: Path, tree: Tree) -> None:
    before = tree(checkout)
    install(checkout, small)
    (small / "defense" / "fmp_core" / "a.py").write_text("new")
    (small / "defense" / "fmp_core" / "b" / "c.py").rename(small / "defense" / "fmp_core" / "f.py")
    assert install(checkout, small) == 6  # and the commit
    assert (checkout / "defense" / "fmp_core" / "a.py").read_text() == "new"
    assert {path.name for path in (checkout / "defense" / "fmp_core").rglob("*.py")} == {"a.py", "f.py"}
    uninstall(checkout)
    assert tree(checkout) == before


def test_what_the_user_changed_or_added_is_kept(repository: Path, small: Path, tree: Tree) -> None:
    before = tree(repository)
    install(repository, small)
    mine = repository / "config" / "defense" / "fmp" / "d.yaml"
    mine.write_text("p: 32")
    for attempt in (lambda: install(repository, small), lambda: uninstall(repository)):
        with pytest.raises(UserError, match=r"d\.yaml .* was changed after installation"):
            attempt()
        assert mine.read_text() == "p: 32"
    install(repository, small, force=True)
    assert mine.read_text() == "# config/defense/fmp/d.yaml\n"
    mine.write_text("p: 32")
    assert uninstall(repository, force=True) == []
    assert tree(repository) == before
    install(repository, small)
    added = mine.with_name("mine.yaml")
    added.write_text("p: 32")
    assert uninstall(repository) == ["config/defense/fmp"]
    assert git(repository, "status", "--porcelain", "-uall").split() == ["??", "config/defense/fmp/mine.yaml"]


def kill_at(step: int, work: Callable[[], object]) -> bool:
    """Do ``work`` in a child that SIGKILLs itself before its ``step``-th change of the file system; True if it was killed."""
    child = os.fork()
    if child == 0:
        left = [step]

        def mortal(function: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "symlink"):
            setattr(os, name, mortal(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert not os.WIFSIGNALED(status) or os.WTERMSIG(status) == signal.SIGKILL
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("finish", ["install", "uninstall"])
def test_a_kill_at_any_step_of_installing_is_recovered(
    checkout: Path, small: Path, tree: Tree, link: bool, finish: str
) -> None:
    before = tree(checkout)
    step, killed = 1, True
    while killed:
        killed = kill_at(step, lambda: install(checkout, small, link=link))
        assert before.items() <= tree(checkout).items(), f"step {step} touched a file of BackdoorBench"
        if finish == "install":
            install(checkout, small, link=link)
            assert (checkout / "defense" / "fmp_core" / "b" / "c.py").read_text() == "# defense/fmp_core/b/c.py\n"
        if (checkout / OWN_FOLDER).exists():
            uninstall(checkout)
        assert tree(checkout) == before, f"step {step}"
        step += 1
    assert step > 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("finish", ["install", "uninstall"])
def test_a_kill_at_any_step_of_updating_or_uninstalling_is_recovered(
    checkout: Path, small: Path, tree: Tree, finish: str
) -> None:
    before = tree(checkout)
    for work in (lambda: install(checkout, small), lambda: uninstall(checkout)):
        step, killed = 1, True
        while killed:
            (small / "defense" / "fmp_core" / "a.py").write_text("old")
            install(checkout, small)
            (small / "defense" / "fmp_core" / "a.py").write_text("new")
            killed = kill_at(step, work)
            if finish == "install":
                install(checkout, small)
                assert (checkout / "defense" / "fmp_core" / "a.py").read_text() == "new"
            if (checkout / OWN_FOLDER).exists():
                uninstall(checkout)
            assert tree(checkout) == before, f"step {step}"
            step += 1
        assert step > 10


def test_bad_input_is_one_sentence(checkout: Path, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(message: str) -> None:
        assert script.main(["--into", str(checkout), "--uninstall"]) == 2
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count("\n") == 1

    refused("FMP is not installed")
    install(checkout, small, link=True)
    with pytest.raises(UserError, match="as links"):
        install(checkout, small)
    with pytest.raises(UserError, match="is where FMP comes from"):
        install(small, small)
    (checkout / OWN_FOLDER / "manifest.json").write_text("{")
    refused("is damaged")
    shutil.rmtree(checkout / "utils")
    refused("is not a BackdoorBench checkout")
