"""install.py: into a checkout and out again, whatever is in the way and whenever it is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import bb_workspace
import install
import pytest
from fmp_core.errors import UserError

PROJECT = Path(install.__file__).resolve().parents[1]


def git(root: Path, *words: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    return subprocess.run(["git", "-C", str(root), *identity, *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout with BackdoorBench's landmarks and a base class of its own."""
    root = tmp_path / "BackdoorBench"
    for name in bb_workspace.LANDMARKS:
        path = root / name
        (path if not path.suffix else path.parent).mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.write_text("class defense:\n    pass\n")
    (root / "defense" / "__init__.py").touch()
    (root / "config" / "defense" / "ft.yaml").touch()
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "as found")
    return root


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A project of six small files in our layout."""
    source = tmp_path / "project"
    for name in ("defense/fmp.py", "defense/fmp_core/a.py", "defense/fmp_core/b.py", "config/defense/fmp/c.yaml"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(f"# {name}\n")
    (source / "record_scripts").mkdir()
    (source / "record_scripts" / "d.py").write_text("# d\n")
    return source


def tree(root: Path) -> dict[str, str | None]:
    """Every path below ``root`` but git's own, with its content."""
    paths = (path for path in sorted(root.rglob("*")) if ".git" not in path.parts)
    return {path.relative_to(root).as_posix(): install.fingerprint(path) for path in paths}


def python(root: Path, code: str) -> str:
    """Run code from the checkout as a user would, compiled files and all."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")}
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True)
    return ran.stdout.strip()


@pytest.mark.parametrize("link", [False, True])
def test_installed_fmp_is_a_defense_of_the_checkout_and_leaves_no_trace(checkout: Path, link: bool) -> None:
    before = tree(checkout)
    assert install.main(["--into", str(checkout), *(["--link"] if link else [])]) == 0
    assert (checkout / "defense" / "fmp_core").is_symlink() == link
    imported = "from defense.fmp import FMP; import defense.base as b; print(issubclass(FMP, b.defense), b.__file__)"
    script = "import runpy; print(issubclass(runpy.run_path('defense/fmp.py')['FMP'], b.defense))"
    said = python(checkout, f"{imported}; {script}").split()
    assert said == ["True", str(checkout / "defense" / "base.py"), "True"]
    assert (checkout / "defense" / "__pycache__").is_dir()
    assert install.main(["--into", str(checkout), "--uninstall"]) == 0
    assert tree(checkout) == before
    assert git(checkout, "status", "--porcelain", "--ignored") == ""


def test_every_file_of_the_project_is_installed(checkout: Path) -> None:
    install.install(checkout)
    for unit in install.UNITS:
        for path in [PROJECT / unit, *(PROJECT / unit).rglob("*")]:
            if path.is_file() and "__pycache__" not in path.parts:
                assert (checkout / path.relative_to(PROJECT)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("place", ["defense/fmp.py", "record_scripts/d.py", "config/defense/fmp"])
def test_foreign_files_are_never_overwritten(checkout: Path, small: Path, place: str) -> None:
    foreign = checkout / place
    foreign.parent.mkdir(parents=True, exist_ok=True)
    foreign.write_text("someone else's")
    before = tree(checkout)
    with pytest.raises((UserError, OSError)):
        install.install(checkout, small, link=place == "config/defense/fmp", force=True)
    assert tree(checkout) == before


def test_an_update_replaces_adds_and_removes(checkout: Path, small: Path) -> None:
    before = tree(checkout)
    install.install(checkout, small)
    (small / "defense" / "fmp_core" / "a.py").write_text("new")
    (small / "defense" / "fmp_core" / "b.py").rename(small / "defense" / "fmp_core" / "e.py")
    assert install.install(checkout, small) == 5
    assert (checkout / "defense" / "fmp_core" / "a.py").read_text() == "new"
    assert sorted(path.name for path in (checkout / "defense" / "fmp_core").iterdir()) == ["a.py", "e.py"]
    install.uninstall(checkout)
    assert tree(checkout) == before


def test_changes_of_the_user_are_kept_unless_forced(checkout: Path, small: Path) -> None:
    before = tree(checkout)
    install.install(checkout, small)
    mine = checkout / "config" / "defense" / "fmp" / "c.yaml"
    mine.write_text("p: 32")
    for attempt in (lambda: install.install(checkout, small), lambda: install.uninstall(checkout)):
        with pytest.raises(UserError, match=r"c\.yaml .* was changed after installation"):
            attempt()
        assert mine.read_text() == "p: 32"
    install.install(checkout, small, force=True)
    assert mine.read_text() == "# config/defense/fmp/c.yaml\n"
    mine.write_text("p: 32")
    assert install.uninstall(checkout, force=True) == []
    assert tree(checkout) == before


def test_files_the_user_added_stay_and_are_named(checkout: Path, small: Path) -> None:
    install.install(checkout, small)
    mine = checkout / "config" / "defense" / "fmp" / "mine.yaml"
    mine.write_text("p: 32")
    assert install.uninstall(checkout) == ["config/defense/fmp"]
    assert mine.read_text() == "p: 32"
    assert git(checkout, "status", "--porcelain", "-uall").split() == ["??", "config/defense/fmp/mine.yaml"]


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
        shutil.copy = mortal(shutil.copy)  # type: ignore[assignment]
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
def test_a_kill_at_any_step_of_installing_is_recovered(checkout: Path, small: Path, link: bool, finish: str) -> None:
    before = tree(checkout)
    step, killed = 1, True
    while killed:
        killed = kill_at(step, lambda: install.install(checkout, small, link=link))
        now = tree(checkout)
        assert before.items() <= now.items(), f"step {step} touched a file of BackdoorBench"
        if finish == "install":
            install.install(checkout, small, link=link)
            assert (checkout / "defense" / "fmp_core" / "b.py").read_text() == "# defense/fmp_core/b.py\n"
        if (checkout / install.OWN_FOLDER).exists():
            install.uninstall(checkout)
        assert tree(checkout) == before, f"step {step}"
        step += 1
    assert step > 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("finish", ["install", "uninstall"])
def test_a_kill_at_any_step_of_updating_or_uninstalling_is_recovered(checkout: Path, small: Path, finish: str) -> None:
    before = tree(checkout)
    for work in (lambda: install.install(checkout, small), lambda: install.uninstall(checkout)):
        step, killed = 1, True
        while killed:
            (small / "defense" / "fmp_core" / "a.py").write_text("old")
            install.install(checkout, small)
            (small / "defense" / "fmp_core" / "a.py").write_text("new")
            killed = kill_at(step, work)
            if finish == "install":
                install.install(checkout, small)
                assert (checkout / "defense" / "fmp_core" / "a.py").read_text() == "new"
            if (checkout / install.OWN_FOLDER).exists():
                install.uninstall(checkout)
            assert tree(checkout) == before, f"step {step}"
            step += 1
        assert step > 10


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: shutil.rmtree(root / "utils"), "is not a BackdoorBench checkout"),
        (lambda root: None, "FMP is not installed"),
        (lambda root: ((root / ".fmp_install").mkdir(), (root / ".fmp_install/manifest.json").write_text("{")), "is damaged"),
    ],
)
def test_bad_input_is_one_sentence(
    checkout: Path, capsys: pytest.CaptureFixture[str], prepare: Callable[[Path], object], message: str
) -> None:
    prepare(checkout)
    assert install.main(["--into", str(checkout), "--uninstall"]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1


def test_links_and_copies_do_not_mix(checkout: Path, small: Path) -> None:
    install.install(checkout, small, link=True)
    with pytest.raises(UserError, match="as links"):
        install.install(checkout, small)
    with pytest.raises(UserError, match="is where FMP comes from"):
        install.install(small, small)
