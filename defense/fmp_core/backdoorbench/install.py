"""FMP into a BackdoorBench checkout as copies or links, and out of it again.

``.fmp_install/manifest.json`` in the checkout says which files are ours and with what content. It is written before the first
of them, and each file appears whole, so that after a kill at any moment installing again, or uninstalling, finishes the work.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fmp_core.errors import UserError
from fmp_core.storage.files import write_text
from fmp_core.system.versions import git_hash

PROJECT = Path(__file__).resolve().parents[3]
UNITS = ("defense/fmp.py", "defense/fmp_core", "config/defense/fmp", "record_scripts")
COMMIT = "defense/fmp_core/commit.txt"
OWN_FOLDER = ".fmp_install"
INCOMING = "incoming"  # in OWN_FOLDER: the one file that is being written


@dataclass
class Manifest:
    """What is ours in a checkout. Paths are relative to its root.

    ``files`` gives the contents we may find (two while an update is under way), as :func:`fingerprint` says them. ``folders``
    did not exist before; neither did ``caches``, the folders of Python's compiled files.
    """

    link: bool
    files: dict[str, list[str]] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    caches: list[str] = field(default_factory=list)


def fingerprint(path: Path) -> str | None:
    """A file's SHA-256, a link's target, or None where there is nothing."""
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    if path.is_dir():
        return "a folder"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def install(root: Path, source: Path = PROJECT, link: bool = False, force: bool = False) -> int:
    """Install or update; returns how many files (or links) there are now.

    Args:
        root: of the checkout; source: of this project.
        link: make symbolic links to ``source`` instead of copies.
        force: discard what the user changed in our files.

    Raises:
        UserError: something in the way is not ours, or was changed, or is installed the other way; nothing was changed then.
    """
    if root == source:
        raise UserError(f"{root} is where FMP comes from; name another checkout with --into.")
    wanted = _contents(source, link)
    manifest = _read_manifest(root) or Manifest(link, caches=_absent_caches(root, wanted))
    if manifest.link != link:
        raise UserError(f"FMP is in {root} as {'links' if manifest.link else 'copies'}; run with --uninstall first.")
    old = list(manifest.files)
    _check_owned(root, {*wanted, *old}, manifest, force)

    new = {
        place: f"link to {content}" if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
        for place, content in wanted.items()
    }
    for place in {*wanted, *old}:  # what is there now (ours, or the user's change that is to be discarded) and what will be
        contents = {*manifest.files.get(place, []), fingerprint(root / place), new.get(place)}
        manifest.files[place] = sorted(content for content in contents if content is not None)
    manifest.folders = sorted({*manifest.folders, *_absent_folders(root, wanted)})
    _write_manifest(root, manifest)
    for place, content in wanted.items():
        _put(root, place, content)
    for place in set(old) - set(wanted):  # of an earlier version
        (root / place).unlink(missing_ok=True)
    manifest.files = {place: [content] for place, content in new.items()}
    _write_manifest(root, manifest)
    return len(new)


def uninstall(root: Path, force: bool = False) -> list[str]:
    """Take out what :func:`install` put in; returns the folders that had to stay, because something else is in them.

    Raises:
        UserError: FMP is not installed, or a file of it was changed; nothing was changed then.
    """
    manifest = _read_manifest(root)
    if manifest is None:
        if not (root / OWN_FOLDER).is_dir():
            raise UserError(f"FMP is not installed in {root} (no {OWN_FOLDER}/manifest.json).")
        shutil.rmtree(root / OWN_FOLDER)  # killed before anything was installed
        return []
    _check_owned(root, manifest.files, manifest, force)
    for place in manifest.files:
        (root / place).unlink(missing_ok=True)
    _remove_caches(root, manifest)
    kept = []
    for folder in sorted(manifest.folders, reverse=True):  # the deepest first
        if not (root / folder).is_dir():
            continue
        try:
            (root / folder).rmdir()
        except OSError:
            kept.append(folder)
    shutil.rmtree(root / OWN_FOLDER)
    return kept


def _contents(source: Path, link: bool) -> dict[str, bytes] | dict[str, Path]:
    """Place in the checkout -> what goes there: the content of every file, or the four things to link."""
    if link:
        return {unit: source / unit for unit in UNITS}
    paths = [path for unit in UNITS for path in (source / unit, *(source / unit).rglob("*"))]
    files = [path for path in paths if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")]
    contents = {path.relative_to(source).as_posix(): path.read_bytes() for path in sorted(files)}
    return {**contents, COMMIT: f"{git_hash()}\n".encode()}  # of the copy, git knows nothing, or BackdoorBench's commit


def _put(root: Path, place: str, content: bytes | Path) -> None:
    """Write a file or link, whole or not at all."""
    incoming = root / OWN_FOLDER / INCOMING
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
    """Raises UserError if anything at ``places`` is not ours, or ours but changed since (unless ``force``)."""
    found = {place: fingerprint(root / place) for place in sorted(places)}
    there = {place: content for place, content in found.items() if content is not None}
    foreign = [place for place in there if place not in manifest.files]
    if foreign:
        raise UserError(f"{listed(foreign)} in {root} did not come from this installer; move it away. Nothing was changed.")
    changed = [place for place, content in there.items() if content not in manifest.files[place]]
    if changed and not force:
        raise UserError(
            f"{listed(changed)} in {root} was changed after installation; save the changes, then add --force to discard them. "
            "Nothing was changed."
        )


def listed(places: list[str]) -> str:
    """The first five, and how many more."""
    return ", ".join(places[:5]) + (f" and {len(places) - 5} more" if len(places) > 5 else "")


def _absent_folders(root: Path, places: Mapping[str, object]) -> set[str]:
    parents = {parent for place in places for parent in Path(place).parents if parent != Path(".")}
    return {parent.as_posix() for parent in parents if not (root / parent).exists()}


def _absent_caches(root: Path, places: Mapping[str, object]) -> list[str]:
    caches = {Path(place).parent / "__pycache__" for place in places if place.endswith(".py")}
    return sorted(cache.as_posix() for cache in caches if not (root / cache).exists())


def _remove_caches(root: Path, manifest: Manifest) -> None:
    """Compiled files of ours; where there was no cache before, also those of the BackdoorBench modules that FMP imported."""
    for cache in manifest.caches:
        for compiled in (root / cache).glob("*.pyc"):
            compiled.unlink()
    for place in map(Path, manifest.files):
        folder = root / place.parent / "__pycache__"
        for compiled in folder.glob(f"{place.stem}.*.pyc"):
            compiled.unlink()
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
