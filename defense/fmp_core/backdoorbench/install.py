"""FMP into a BackdoorBench checkout as copies or links, and out of it again.

``.fmp_install/manifest.json`` in the checkout says which files are ours and with what content. It is written before the first
of them, and each file appears whole, so that after a kill at any moment installing again, or uninstalling, finishes the work.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fmp_core import PROJECT
from fmp_core.errors import UserError
from fmp_core.storage.files import write_text
from fmp_core.system.versions import git_hash

UNITS = ("defense/fmp.py", "defense/fmp_core", "config/defense/fmp", "record_scripts")
COMMIT = "defense/fmp_core/commit.txt"
OWN_FOLDER = ".fmp_install"


@dataclass
class Manifest:
    """The files of ours in a checkout by their path from its root, with the contents we may find (see :func:`fingerprint`):
    two of them while an update is under way."""

    link: bool
    files: dict[str, list[str]] = field(default_factory=dict)


def fingerprint(path: Path) -> str | None:
    """A file's SHA-256, a link's target, or None where there is nothing."""
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    if path.is_dir():
        return "a folder"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def install(root: Path, source: Path = PROJECT, link: bool = False, force: bool = False) -> int:
    """Install ``source``, or update, in the checkout ``root``, as copies or as links; returns how many there are now.

    ``force`` discards what the user changed in our files. Raises UserError, with nothing changed, if something in the way is
    not ours, or was changed, or is installed the other way.
    """
    if root == source:
        raise UserError(f"{root} is where FMP comes from; name another checkout with --into.")
    manifest = _read_manifest(root) or Manifest(link)
    if manifest.link != link:
        raise UserError(f"FMP is in {root} as {'links' if manifest.link else 'copies'}; run with --uninstall first.")
    wanted = {unit: source / unit for unit in UNITS} if link else _copies(source)
    old = list(manifest.files)
    _check_owned(root, {*wanted, *old}, manifest, force)

    new = {
        place: f"link to {content}" if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
        for place, content in wanted.items()
    }
    for place in {*wanted, *old}:  # what is there now (ours, or the user's change that is to be discarded) and what will be
        contents = {*manifest.files.get(place, []), fingerprint(root / place), new.get(place)}
        manifest.files[place] = sorted(content for content in contents if content is not None)
    _write_manifest(root, manifest)
    for place, content in wanted.items():
        _put(root, place, content)
    for place in set(old) - set(wanted):  # of an earlier version
        (root / place).unlink(missing_ok=True)
    _write_manifest(root, Manifest(link, {place: [content] for place, content in new.items()}))
    return len(new)


def uninstall(root: Path, force: bool = False) -> list[str]:
    """Take out what :func:`install` put in; returns the folders that had to stay, because something else is in them.

    Compiled files beside ours go, too, also those of the BackdoorBench modules that FMP imported. Raises UserError, with
    nothing changed, if FMP is not installed or a file of it was changed.
    """
    if not (root / OWN_FOLDER).is_dir():
        raise UserError(f"FMP is not installed in {root} (no {OWN_FOLDER}/manifest.json).")
    manifest = _read_manifest(root) or Manifest(link=True)  # none: killed before anything was installed
    _check_owned(root, manifest.files, manifest, force)
    for place in manifest.files:
        (root / place).unlink(missing_ok=True)
    shutil.rmtree(root / "defense" / "__pycache__", ignore_errors=True)
    kept = []
    for unit in () if manifest.link else UNITS:
        for folder, _, _ in os.walk(root / unit, topdown=False):
            if folder.endswith("__pycache__"):
                shutil.rmtree(folder)
            elif os.listdir(folder):
                kept.append(Path(folder).relative_to(root).as_posix())
            else:
                os.rmdir(folder)
    shutil.rmtree(root / OWN_FOLDER)
    return kept


def _copies(source: Path) -> dict[str, bytes]:
    """Place in the checkout -> content of every file that goes there."""
    paths = [path for unit in UNITS for path in (source / unit, *(source / unit).rglob("*"))]
    files = [path for path in paths if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")]
    contents = {path.relative_to(source).as_posix(): path.read_bytes() for path in sorted(files)}
    return {**contents, COMMIT: f"{git_hash()}\n".encode()}  # of the copy, git knows nothing, or BackdoorBench's commit


def _put(root: Path, place: str, content: bytes | Path) -> None:
    """Write a file or link, whole or not at all."""
    incoming = root / OWN_FOLDER / "incoming"
    incoming.unlink(missing_ok=True)
    if isinstance(content, Path):
        incoming.symlink_to(content)
    else:
        incoming.write_bytes(content)
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    os.replace(incoming, root / place)


def _read_manifest(root: Path) -> Manifest | None:
    path = root / OWN_FOLDER / "manifest.json"
    if not path.is_file():
        return None
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged; remove FMP's files by hand ({', '.join(UNITS)}), and {path.parent}.") from None


def _write_manifest(root: Path, manifest: Manifest) -> None:
    write_text(root / OWN_FOLDER / "manifest.json", json.dumps(asdict(manifest), indent=1) + "\n")


def _check_owned(root: Path, places: Collection[str], manifest: Manifest, force: bool) -> None:
    """Raises UserError if anything at ``places`` is not ours, or lies behind a link, or is ours but changed since (unless
    ``force``)."""
    there = {place: content for place in sorted(places) if (content := fingerprint(root / place)) is not None}
    foreign = [place for place in there if place not in manifest.files or _is_behind_link(root, place)]
    if foreign:
        raise UserError(f"{listed(foreign)} in {root} did not come from this installer; move it away. Nothing was changed.")
    changed = [place for place, content in there.items() if content not in manifest.files[place]]
    if changed and not force:
        raise UserError(
            f"{listed(changed)} in {root} was changed after installation; save the changes, then add --force to discard them. "
            "Nothing was changed."
        )


def _is_behind_link(root: Path, place: str) -> bool:
    """Whether a folder of ``root`` on the way to ``place`` is a link."""
    return any((root / parent).is_symlink() for parent in Path(place).parents if parent.parts)


def listed(places: list[str]) -> str:
    """The first five, and how many more."""
    return ", ".join(places[:5]) + (f" and {len(places) - 5} more" if len(places) > 5 else "")
