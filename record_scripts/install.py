#!/usr/bin/env python3
"""Put FMP into a BackdoorBench checkout, or take it out again.

    python record_scripts/install.py --into ~/BackdoorBench            # copies; --link makes symbolic links instead
    python record_scripts/install.py --into ~/BackdoorBench --uninstall

adds ``defense/fmp.py``, ``defense/fmp_core/``, ``config/defense/fmp/`` and ``record_scripts/``, and no more. A file that is not
ours is never overwritten. ``.fmp_install/manifest.json`` in the checkout says which files are ours and with what content; it is
written before the first of them, so that after a kill at any moment the same command, or ``--uninstall``, finishes the work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "defense"))

from fmp_core.backdoorbench.workspace import find_checkout
from fmp_core.errors import UserError
from fmp_core.storage.files import write_text

PROJECT = Path(__file__).resolve().parents[1]
UNITS = ("defense/fmp.py", "defense/fmp_core", "config/defense/fmp", "record_scripts")
OWN_FOLDER = ".fmp_install"


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


def read_manifest(root: Path) -> Manifest | None:
    """The checkout's manifest, None without one. Raises UserError if it is damaged."""
    path = root / OWN_FOLDER / "manifest.json"
    if not path.is_file():
        return None
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged; remove FMP's files by hand ({', '.join(UNITS)}), and {path.parent}.") from None


def write_manifest(root: Path, manifest: Manifest) -> None:
    write_text(root / OWN_FOLDER / "manifest.json", json.dumps(asdict(manifest), indent=1) + "\n")


def plan(source: Path, link: bool) -> dict[str, Path]:
    """Place in the checkout -> what goes there: every file to copy, or the four things to link."""
    if link:
        return {unit: source / unit for unit in UNITS}
    files = [path for unit in UNITS for path in ([source / unit] if (source / unit).is_file() else (source / unit).rglob("*"))]
    wanted = [path for path in files if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")]
    return {path.relative_to(source).as_posix(): path for path in sorted(wanted)}


def check_owned(root: Path, places: list[str], manifest: Manifest, force: bool) -> None:
    """Raises UserError if anything at ``places`` is not ours, or ours but changed since (unless ``force``)."""
    found = {place: fingerprint(root / place) for place in places}
    there = {place: content for place, content in found.items() if content is not None}
    foreign = [place for place in there if place not in manifest.files]
    if foreign:
        raise UserError(f"{_listed(foreign)} in {root} did not come from this installer; move it away. Nothing was changed.")
    changed = [place for place, content in there.items() if content not in manifest.files[place]]
    if changed and not force:
        raise UserError(
            f"{_listed(changed)} in {root} was changed after installation; save the changes, then add --force to discard them. "
            "Nothing was changed."
        )


def _listed(places: list[str]) -> str:
    return ", ".join(places[:5]) + (f" and {len(places) - 5} more" if len(places) > 5 else "")


def install(root: Path, source: Path = PROJECT, link: bool = False, force: bool = False) -> int:
    """Install or update; returns how many files (or links) there are now.

    Raises:
        UserError: something in the way is not ours, or was changed, or is installed the other way; nothing was changed then.
    """
    if root == source:
        raise UserError(f"{root} is where FMP comes from; name another checkout with --into.")
    wanted = plan(source, link)
    before = read_manifest(root)
    if before is not None and before.link != link:
        raise UserError(f"FMP is in {root} as {'links' if before.link else 'copies'}; run with --uninstall first.")
    now = before or Manifest(link, caches=_absent_caches(root, wanted))
    check_owned(root, sorted({*wanted, *now.files}), now, force)
    shutil.rmtree(root / OWN_FOLDER / "staged", ignore_errors=True)

    old = {place: list(contents) for place, contents in now.files.items()}
    new = {place: f"link to {path}" if link else str(fingerprint(path)) for place, path in wanted.items()}
    both = {place: [*old.get(place, []), *([new[place]] if place in new else [])] for place in {**old, **new}}
    # A file changed by the user that is to be discarded is ours from now on.
    for place in both:
        here = fingerprint(root / place)
        both[place] += [here] if here is not None and here not in both[place] else []
    now.files, now.folders = both, sorted({*now.folders, *_absent_folders(root, wanted)})
    write_manifest(root, now)

    staged = _stage(root, wanted, link)
    for place, file in staged.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, root / place)
    for place in set(old) - set(new):  # of an earlier version
        (root / place).unlink(missing_ok=True)
    (root / OWN_FOLDER / "staged").rmdir()
    now.files = {place: [content] for place, content in new.items()}
    write_manifest(root, now)
    return len(new)


def _absent_folders(root: Path, places: dict[str, Path]) -> set[str]:
    parents = {parent for place in places for parent in Path(place).parents if parent != Path(".")}
    return {parent.as_posix() for parent in parents if not (root / parent).exists()}


def _absent_caches(root: Path, places: dict[str, Path]) -> list[str]:
    caches = {Path(place).parent / "__pycache__" for place in places if place.endswith(".py")}
    return sorted(cache.as_posix() for cache in caches if not (root / cache).exists())


def _stage(root: Path, wanted: dict[str, Path], link: bool) -> dict[str, Path]:
    """Everything ready beside the manifest, so that only renames remain."""
    folder = root / OWN_FOLDER / "staged"
    folder.mkdir(parents=True)
    staged = {}
    for number, (place, path) in enumerate(wanted.items()):
        staged[place] = folder / str(number)
        if link:
            staged[place].symlink_to(path)
        else:
            shutil.copy(path, staged[place])
    return staged


def uninstall(root: Path, force: bool = False) -> list[str]:
    """Take out what :func:`install` put in; returns the folders that had to stay, because something else is in them.

    Raises:
        UserError: FMP is not installed, or a file of it was changed; nothing was changed then.
    """
    manifest = read_manifest(root)
    if manifest is None:
        if not (root / OWN_FOLDER).is_dir():
            raise UserError(f"FMP is not installed in {root} (no {OWN_FOLDER}/manifest.json).")
        shutil.rmtree(root / OWN_FOLDER)  # killed before anything was installed
        return []
    check_owned(root, list(manifest.files), manifest, force)
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


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", required=True, metavar="DIR", help="root of a BackdoorBench checkout")
    parser.add_argument("--link", action="store_true", help="symbolic links to this project instead of copies")
    parser.add_argument("--uninstall", action="store_true", help="take FMP out again")
    parser.add_argument("--force", action="store_true", help="discard changes made to FMP's files in the checkout")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        root = find_checkout(args.into)
        if args.uninstall:
            kept = uninstall(root, args.force)
            print(f"FMP was taken out of {root}." + (f" Kept, not empty: {_listed(kept)}." if kept else ""))
        else:
            count = install(root, PROJECT, args.link, args.force)
            print(f"FMP is in {root} ({count} {'links' if args.link else 'files'}). From there: python defense/fmp.py")
    except (UserError, OSError) as error:
        print(f"install: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
