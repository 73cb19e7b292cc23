"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmp_core.errors import UserError

LARGEST_FILE = 16 * 2**30  # bytes of a model or record; sparse files may claim more at no cost
HOST = re.sub(r"\W", "_", platform.node())  # part of temporary names, since folders are shared between machines


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, to be written; on a clean exit fsync it and rename it over ``path``.

    After an exception (or a kill) ``path`` is what it was before. The temporary name keeps the suffix, because
    matplotlib and pandas choose the format by it.
    """
    path = Path(path).absolute()  # pandas takes a relative "~" for the user's home
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary = path.with_name(f".{path.stem}.{HOST}-{os.getpid()}.{secrets.token_hex(8)}{path.suffix}")
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            if os.name == "posix":  # only then is the rename durable; Windows cannot open folders, and needs no such call
                _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal. Raises UserError: it is no regular file, or larger than any record."""
    if not path.is_file() or path.stat().st_size > LARGEST_FILE:
        raise UserError(f"{path} is no file of at most {LARGEST_FILE >> 30} GiB, as models and records are; look at it.")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of ``path`` that killed processes of this machine left."""
    ours = re.compile(rf"\.{re.escape(path.stem)}\.{HOST}-(\d+)\.\w+{re.escape(path.suffix)}")
    for file in path.parent.iterdir():
        named = ours.fullmatch(file.name)
        if named and not _runs(int(named[1])):
            file.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, OSError) and not isinstance(error, ProcessLookupError)  # it may be somebody else's
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block (disk full, no permission, ...) into the UserError that ``path`` cannot be written."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}); what was there is unchanged. "
            f"{'Free disk space or choose' if full else 'Choose'} another folder, and run the same command again."
        ) from None


def check_folders(*folders: Path, remedy: str = "choose another folder") -> None:
    """Raise UserError unless ``folders`` exist or can be made: a name may be taken by a file, or a parent not writable.

    ``remedy``: what the error says to do.
    """
    for folder in folders:
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            reason = "is not writable" if parent.is_dir() else "is a file"
            raise UserError(f"{folder} cannot be written, because {parent} {reason}; {remedy}.")


def make_folders(*folders: Path) -> None:
    """Make all of ``folders``, or none of them. Raises UserError as :func:`check_folders`, or if the disk is full."""
    check_folders(*folders)
    for folder in folders:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)


def bring_back(folder: Path, aside: Path, last_file: str | None = None) -> None:
    """Undo :func:`put_aside` of a process that was killed, if there is something to undo.

    If ``folder`` has a file called ``last_file``, what was written there since is whole, and stays.
    """
    if not os.path.lexists(aside):
        return
    replaced = last_file is not None and (folder / last_file).exists()
    _remove(aside if replaced else folder)
    if not replaced:
        aside.rename(folder)


def _remove(folder: Path) -> None:
    """Of a link only the link. What cannot be removed stays."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def aside_by_sweep(folder: Path) -> Path:
    """Where a sweep keeps a result of BackdoorBench while another run writes into ``folder``."""
    return folder.with_name(f".{folder.name}.aside")


@dataclass
class PutAside:
    """Whether what was put aside has been replaced, and can go."""

    replaced: bool = False


@contextlib.contextmanager
def put_aside(folder: Path, aside: Path, last_file: str | None = None) -> Iterator[PutAside]:
    """Within the block ``folder`` is called ``aside``; then it takes its place again, unless the block set ``replaced``.

    First undoes what a killed process put aside: :func:`bring_back`.
    """
    bring_back(folder, aside, last_file)
    if os.path.lexists(folder):
        folder.rename(aside)
    state = PutAside()
    try:
        yield state
    finally:
        if state.replaced:
            _remove(aside)
        else:
            bring_back(folder, aside)


@contextlib.contextmanager
def hidden(file: Path) -> Iterator[None]:
    """Within the block there is no ``file`` until the block writes it.

    An exception brings the old one back if the block has changed nothing in the folder yet; a kill does not.
    """

    def others() -> dict[str, tuple[int, int]]:
        states = {path.name: path.lstat() for path in file.parent.iterdir() if not path.name.startswith(".")}
        return {name: (state.st_ino, state.st_mtime_ns) for name, state in states.items()}

    aside, before = file.with_name(f".{file.name}.before"), {}
    if moved := file.exists():
        before = others()
        del before[file.name]
        file.replace(aside)
    try:
        yield
    except BaseException:
        if moved and others() == before:
            aside.replace(file)
        aside.unlink(missing_ok=True)
        raise
    aside.unlink(missing_ok=True)


def refuse_links_out_of(root: Path, *folders: Path) -> None:
    """Raise UserError if one of ``folders`` below ``root`` (existing or not) really lies elsewhere.

    A stranger may have made the record; nothing is written where links in it lead.
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
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files need not be Unicode


def write_json(path: str | Path, content: Any) -> None:
    """Write ``content`` as readable JSON, whole or not at all; what JSON does not know, such as paths, as text."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def write_torch(path: str | Path, obj: Any) -> None:
    """``torch.save(obj)`` to ``path``, whole or not at all."""
    import torch  # takes seconds, and most users of this file do without

    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(obj, file)
        except RuntimeError as error:
            if isinstance(error.__context__, (OSError, KeyboardInterrupt)):  # torch hides a full disk, and Ctrl-C
                raise error.__context__ from None
            raise


def check_distinct(files: Mapping[str, Path]) -> None:
    """Raises UserError if two flags, ``--`` and a key of ``files``, name one file: the second would replace the first."""
    if twice := [kind for kind in files if sum(files[kind].absolute() == path.absolute() for path in files.values()) > 1]:
        raise UserError(f"{' and '.join(f'--{kind}' for kind in twice)} name one file, {files[twice[0]]}; give each its own.")
