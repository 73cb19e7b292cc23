"""Declared settings: a dataclass whose fields know how their values are read, which ranges they have and what they mean.

:class:`~fmp_core.settings.Settings` (``fmp.py``), ``AttackSettings`` (``make_record.py``) and ``Sweep`` (a sweep file) are such
classes. A field is declared with :func:`setting`; its value is read from a flag (:func:`add_flags`, then :func:`parse_flags`)
or from a YAML file (:func:`read_yaml_mapping`, then :func:`parse_mapping`), and wrong values end in one sentence::

    @dataclasses.dataclass(frozen=True)
    class Sweep:
        records: Sequence[Any] = setting(REQUIRED, list_of(ANYTHING), "names of records, or flags of make_record.py")
        workers: int = setting(1, integer(1), "jobs at once on the CPU")
        slurm: Mapping[str, Any] = setting(dict, mapping("partition", "time"), "what sbatch is asked for")

    Sweep(**parse_mapping(Sweep, read_yaml_mapping(path, "Sweep file"), f"Sweep file {path}"))
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fmp_core.errors import UserError

LARGEST_YAML = 2**18  # bytes; ours have 3000
REQUIRED = dataclasses.MISSING  # the default of a setting that has none


@dataclasses.dataclass(frozen=True)
class Kind:
    """How text or a YAML value is read.

    Args:
        parse: raises ValueError, TypeError, ZeroDivisionError or OverflowError on an impossible value.
        expects: what is possible, as it ends the sentence "--eps is 7, but must be ...".
        metavar: what stands for the value in ``--help``.
        boolean: a flag without a value means True.
    """

    parse: Callable[[Any], Any]
    expects: str
    metavar: str
    boolean: bool = False


def integer(low: int, high: int | None = None, metavar: str = "N") -> Kind:
    """A whole number in [low, high]."""

    def parse(value: Any) -> int:
        if isinstance(value, bool) or int(str(value)) < low or (high is not None and int(str(value)) > high):
            raise ValueError
        return int(str(value))

    return Kind(parse, f"a whole number of at least {low}" + ("" if high is None else f" and at most {high}"), metavar)


def number(low: float, high: float = float("inf"), *, above: bool = False, metavar: str = "X") -> Kind:
    """A finite number in [low, high], or ]low, high] with ``above``; fractions such as ``1/255`` are welcome."""

    def parse(value: Any) -> float:
        if isinstance(value, bool):
            raise ValueError
        numerator, _, denominator = str(value).partition("/")
        result = float(numerator) / float(denominator or 1)
        if not math.isfinite(result) or not (low < result if above else low <= result) or result > high:
            raise ValueError
        return result

    bound = f"above {low:g}" if above else f"of at least {low:g}"
    return Kind(parse, f"a number {bound}" + (f" and at most {high:g}" if high < float("inf") else ""), metavar)


def choice(*names: str) -> Kind:
    """One of ``names``."""

    def parse(value: Any) -> str:
        if value not in names:
            raise ValueError
        return str(value)

    expects = "one of " + ", ".join(names) if len(names) > 1 else names[0]
    return Kind(parse, expects, "{" + ",".join(names) + "}")


def text(metavar: str = "TEXT") -> Kind:
    """A text that is not empty; ``metavar`` FILE or FOLDER: a path."""

    def parse(value: Any) -> str:
        if not isinstance(value, (str, Path)) or not str(value):
            raise ValueError
        return str(value)

    return Kind(parse, {"FILE": "the path of a file", "FOLDER": "the path of a folder"}.get(metavar, "a text"), metavar)


def pattern(expression: str, expects: str, metavar: str = "NAME") -> Kind:
    """A text that the regular expression matches as a whole."""

    def parse(value: Any) -> str:
        if not re.fullmatch(expression, str(value)):
            raise ValueError
        return str(value)

    return Kind(parse, expects, metavar)


def or_word(kind: Kind, word: str) -> Kind:
    """What ``kind`` reads, or ``word`` itself."""
    return Kind(lambda v: word if v == word else kind.parse(v), f"{kind.expects}, or {word}", f"{{{kind.metavar},{word}}}")


def numbers(kind: Kind, expects: str, metavar: str, lengths: Sequence[int] = ()) -> Kind:
    """Values of ``kind`` separated by commas (in YAML also a list), as a tuple; ``lengths``: how many there may be."""

    def parse(value: Any) -> tuple[Any, ...]:
        parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
        if lengths and len(parts) not in lengths:
            raise ValueError
        return tuple(kind.parse(part) for part in parts)

    return Kind(parse, expects, metavar)


def list_of(kind: Kind, expects: str = "a list with at least one entry") -> Kind:
    """A YAML list that is not empty."""

    def parse(value: Any) -> list[Any]:
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            raise ValueError
        return [kind.parse(entry) for entry in value]

    return Kind(parse, expects, "LIST")


def mapping(*keys: str) -> Kind:
    """A YAML mapping; ``keys``: those it may have, if not any."""

    def parse(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping) or (keys and not set(value) <= set(keys)):
            raise ValueError
        return dict(value)

    return Kind(parse, "'key: value' lines" + (f" with the keys {', '.join(keys)}" if keys else ""), "MAPPING")


def _parse_boolean(value: Any) -> bool:
    lower = str(value).lower()
    if lower not in ("true", "false", "1", "0"):
        raise ValueError
    return lower in ("true", "1")


BOOLEAN = Kind(_parse_boolean, "True or False", "BOOL", boolean=True)
ANYTHING = Kind(lambda value: value, "anything", "VALUE")
NAME = pattern(r"[A-Za-z0-9_][A-Za-z0-9._=-]{0,99}", "a folder name of letters, digits, '.', '_', '=' and '-'")


def setting(default: Any, kind: Kind, help: str, short: str | None = None, **tags: Any) -> Any:
    """Declare a field of a settings class.

    Args:
        default: a value, a class that makes one (``dict``), or REQUIRED.
        help: what it is, for ``--help`` and docs/flags.md, without the default.
        short: a second, short flag.
        tags: kept in the field's metadata beside these; ``shown``: the default as help writes it.
    """
    metadata = {"kind": kind, "help": help, "short": short, **tags}
    if isinstance(default, type) and default is not REQUIRED:
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def fields_of(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a settings class by name."""
    return {field.name: field for field in dataclasses.fields(cls)}


def parse_value(cls: type, name: str, value: Any, source: str) -> Any:
    """One value of the setting ``name``.

    Raises:
        UserError: the value is impossible; names ``source`` (a flag, or a file and key).
    """
    kind = fields_of(cls)[name].metadata["kind"]
    try:
        return kind.parse(value)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        raise UserError(f"{source} is {value!r}, but must be {kind.expects}.") from None


def parse_flags(cls: type, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ``cls`` among parsed ``flags`` that were given. Raises UserError, naming the flag."""
    given = {name: flags[name] for name in fields_of(cls) if flags.get(name) is not None}
    return {name: parse_value(cls, name, value, f"--{name}") for name, value in given.items()}


def parse_mapping(cls: type, content: Mapping[Any, Any], source: str) -> dict[str, Any]:
    """The settings that a YAML file holds; blank values are left out, as BackdoorBench does.

    Raises:
        UserError: an unknown key, an impossible value, or a missing one; begins with ``source``, such as "Sweep file x.yaml".
    """
    fields = fields_of(cls)
    for key in content:
        if key not in fields:
            raise UserError(f"{source} has the unknown key {key!r}; known keys: {', '.join(fields)}.")
    values = {key: parse_value(cls, key, value, f"{source}: {key}") for key, value in content.items() if value is not None}
    for name, field in fields.items():
        if field.default is REQUIRED and field.default_factory is REQUIRED and name not in values:
            raise UserError(f"{source} has no {name}, which must be {field.metadata['kind'].expects}.")
    return values


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few of them can stand for a value whose text fills any memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("settings need no *aliases")
        return super().compose_node(parent, index)


def read_yaml_mapping(path: Path, what: str) -> Mapping[Any, Any]:
    """The mapping a YAML file holds; empty if the file is.

    Raises:
        UserError: not readable YAML, larger than 256 KiB, or not a mapping; begins with ``what``, such as "Sweep file".
    """
    try:
        if path.stat().st_size > LARGEST_YAML:
            raise OSError(f"it is larger than {LARGEST_YAML >> 10} KiB")
        content = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"{what} {path} cannot be read as YAML: {detail}.") from None
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise UserError(f"{what} {path} must hold 'key: value' lines, not a {type(content).__name__}.")
    return content


def as_text(value: Any) -> str:
    """A value as it is written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def default_text(field: dataclasses.Field[Any]) -> str:
    """The default of a field as a reader writes it; empty if there is none."""
    value = field.metadata.get("shown", field.default)
    return "" if value is None or value is REQUIRED else f"{value:g}" if isinstance(value, float) else as_text(value)


def add_flags(
    parser: argparse._ActionsContainer,
    cls: type,
    names: Iterable[str] | None = None,
    helps: Mapping[str, str] | None = None,
    defaults: bool = True,
) -> None:
    """Declare the flags ``--name`` of the settings ``names`` (default all) on a parser or an argument group.

    All default to None, so that a value from elsewhere is overridden only by a flag that is given; values stay text and are
    read by :func:`parse_flags`, so that a bad flag and a bad YAML key read alike. A bare boolean flag means True, and
    BackdoorBench's ``--amp True`` works too.

    Args:
        helps: used instead of the fields' own words.
        defaults: whether to tell the fields' defaults.
    """
    fields = fields_of(cls)
    for name in fields if names is None else names:
        about = fields[name].metadata
        words, default = (helps or {}).get(name, about["help"]), default_text(fields[name])
        words += f" (default {default})" if default and defaults else ""
        short = [about["short"]] if about["short"] else []
        bare: dict[str, Any] = {"nargs": "?", "const": "True"} if about["kind"].boolean else {}
        words = words.replace("%", "%%")
        parser.add_argument(*short, f"--{name}", default=None, metavar=about["kind"].metavar, help=words, **bare)


def markdown(cls: type, names: Iterable[str]) -> str:
    """The settings ``names`` of ``cls`` as a table in Markdown."""
    rows = ["| flag | default | value | what it is |", "|---|---|---|---|"]
    for name in names:
        field = fields_of(cls)[name]
        about, default = field.metadata, default_text(field)
        flags = f"`--{name}`" + (f", `{about['short']}`" if about["short"] else "")
        words = about["help"].replace("<", "&lt;").replace("|", "&#124;")
        rows.append(f"| {flags} | {f'`{default}`' if default else ''} | {about['kind'].expects} | {words} |")
    return "\n".join(rows) + "\n"
