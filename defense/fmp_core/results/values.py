"""Values from files of strangers: what is not of the kind expected is taken for absent, or named in one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

from fmp_core.errors import UserError, in_one_line

T = TypeVar("T")
MOST_BYTES = 16 * 2**20  # no metric csv of BB comes near this


def read_text(path: Path) -> str:
    """The UTF-8 text of a file of at most 16 MiB. Raises UserError: it is no regular file, larger, or unreadable."""
    try:
        if not path.is_file():  # a pipe would never end
            raise UserError(f"{path} is no regular file" if path.exists() else f"{path} does not exist")
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} is larger than {MOST_BYTES >> 20} MiB, which no result is")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({in_one_line(error, 120)})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError: there is none."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return content


def whole_number(content: Mapping[str, Any], key: str) -> int | None:
    """The whole number under ``key``, if it is one that a table can hold."""
    value = value_of(content, key, int)
    return value if value is not None and abs(value) < 2**63 else None


def value_of(content: Mapping[str, Any], key: str, kind: type[T]) -> T | None:
    """The value of ``key`` if it is of the ``kind`` expected."""
    value = content.get(key)
    return value if is_of_type(value, kind) else None


def is_of_type(value: Any, kind: Any) -> bool:
    """Whether a value of a JSON file is of ``kind``: a plain type, ``Any``, a union, ``dict[str, T]``, ``list[T]`` or,
    which JSON writes as a list, ``tuple[T, ...]``."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is UnionType:
        return any(is_of_type(value, part) for part in parts)
    if origin in (list, tuple):
        return isinstance(value, list) and all(is_of_type(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(is_of_type(item, parts[1]) for item in value.values())
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def finite_number(value: Any) -> float | None:
    """``value`` as a float, if it is a finite number or the text of one; a truth value is none."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
