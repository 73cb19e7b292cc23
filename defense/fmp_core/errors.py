"""The exception whose message is for the user, and what such messages share."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """Bad input. The message is one sentence: which file or flag, what is wrong, what to do.

    :func:`fmp_core.system.cli.run_main` prints it without a traceback and exits with code 2. Names in it may come from a
    stranger's file, so it is kept to one line, without control characters, of at most 1500 characters.
    """

    def __init__(self, message: str):
        if len(message) > 1500:
            message = f"{message[:1000]} ... {message[-300:]}"
        super().__init__("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in message))


def in_one_line(error: BaseException, most: int = 200) -> str:
    """What a library's ``error`` says, for a sentence: at most ``most`` characters."""
    return " ".join(str(error).split())[:most]


def what_is_there(path: Path) -> str:
    """Why ``path`` is no file to read, as a sentence has it after the path."""
    return "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion that continues a sentence about ``word``, empty if none of the ``known`` words is like it."""
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
