"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fmp_core.errors import UserError

HOST = re.sub(r"\W", "_", platform.node())  # part of temporary names, since folders are shared between machines


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on a clean exit fsync it and rename it over ``path``.

    After an exception (or a kill) ``path`` is what it was before. The temporary name keeps the suffix, because
    matplotlib and pandas choose the format by it.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.{HOST}-{os.getpid()}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove what killed processes of this machine left of ``path``: temporary files named after processes that are gone."""
    ours = re.compile(rf"\.{re.escape(path.stem)}\.{HOST}-(\d+)\.\w{{8}}{re.escape(path.suffix)}")
    for left in path.parent.iterdir():
        named = ours.fullmatch(left.name)
        if named and not _runs(int(named[1])):
            left.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into the sentence that ``path`` cannot be written.

    Raises:
        UserError: disk full, folder read-only, no permission, ...
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); what was there is unchanged. Make room or choose another "
            "folder, and run the same command again."
        ) from None


def _umask() -> int:
    # mkstemp makes private files; results should have the permissions any other new file gets.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    # A rename is durable only when the folder entry is; Windows cannot open folders, and needs no such call.
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_disks() -> None:
    """Return when everything written so far will survive a power cut (where the system can say so)."""
    if hasattr(os, "sync"):
        os.sync()


def check_folders(*folders: Path) -> None:
    """Make sure that ``folders`` exist or can be made, without making them.

    Raises:
        UserError: a name is taken by a file, or a parent is not writable.
    """
    for folder in folders:
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            reason = "is not writable" if parent.is_dir() else "is a file"
            raise UserError(f"Folder {folder} cannot be made, because {parent} {reason}; choose another or free the name.")


def make_folders(*folders: Path) -> None:
    """Make all of ``folders``, or none of them.

    Raises:
        UserError: as :func:`check_folders`, or the disk is full.
    """
    check_folders(*folders)
    for folder in folders:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)


def refuse_links_out_of(root: Path, *folders: Path) -> None:
    """A folder that a stranger made may hold links; nothing is written where they lead.

    Raises:
        UserError: one of ``folders`` below ``root`` (existing or not) really lies elsewhere.
    """
    for folder in folders:
        if not folder.resolve().is_relative_to(root.resolve()):
            raise UserError(
                f"{folder} leads out of the record, to {folder.resolve()}, and was refused; remove the link, or let results "
                "go elsewhere with --save_folder."
            )


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_torch(path: str | Path, obj: Any) -> None:
    """``torch.save(obj)`` to ``path``, whole or not at all."""
    import torch  # takes seconds, and most users of this file do without

    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(obj, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides that the disk is full
                raise error.__context__ from None
            raise
