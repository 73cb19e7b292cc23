"""Declared settings: a dataclass whose fields know how their values are read, which ranges they have and what they mean.

A field is declared with :func:`setting`. Its value is read from a flag (:func:`add_flags`, then :func:`parse_flags`) or from a
YAML file (:func:`read_yaml_mapping`, then :func:`parse_mapping`), and a wrong one ends in one sentence::

    @dataclasses.dataclass(frozen=True)
    class Sweep:
        records: Sequence[Any] = setting(REQUIRED, list_of(ANYTHING), "names of records, or flags of make_record.py")
        workers: int = setting(1, integer(1), "jobs at once on the CPU")
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fmp_core.errors import UserError, did_you_mean, in_one_line

T = TypeVar("T")
LARGEST_YAML = 2**18  # bytes; ours have 3000
REQUIRED = dataclasses.MISSING  # the default of a setting that has none


@dataclasses.dataclass(frozen=True)
class Kind:
    """How text or a YAML value is read.

    Args:
        parse: raises ValueError, TypeError, ArithmeticError or LookupError on an impossible value.
        expects: what is possible, as it ends the sentence "--eps is 7, but must be ...".
        metavar: what stands for the value in ``--help``; default: the last word of the setting's name.
        boolean: a flag without a value means True.
        several: a value consists of several, which a list may hold.
    """

    parse: Callable[[Any], Any]
    expects: str
    metavar: str = ""
    boolean: bool = False
    several: bool = False


def _checked(value: T, fits: bool) -> T:
    if not fits:
        raise ValueError
    return value


def integer(low: int, high: int | None = None, metavar: str = "N") -> Kind:
    """A whole number in [low, high]; torch takes none of more than 64 bits."""

    def parse(value: Any) -> int:
        result = int(str(value))
        return _checked(result, low <= result <= (2**63 - 1 if high is None else high))

    return Kind(parse, f"a whole number of at least {low}" + ("" if high is None else f" and at most {high}"), metavar)


def number(low: float, high: float = math.inf, *, above: bool = False, metavar: str = "") -> Kind:
    """A finite number in [low, high], or ]low, high] with ``above``; fractions such as ``1/255`` are welcome."""

    def parse(value: Any) -> float:
        numerator, slash, denominator = str(value).partition("/")
        result = float(numerator) / (float(denominator) if slash else 1)
        return _checked(result, math.isfinite(result) and (low < result if above else low <= result) and result <= high)

    bound = f"above {low:g}" if above else f"of at least {low:g}"
    return Kind(parse, f"a number {bound}" + (f" and at most {high:g}" if high < math.inf else ""), metavar)


def choice(*names: str) -> Kind:
    """One of ``names``."""
    expects = "one of " + ", ".join(names) if len(names) > 1 else names[0]
    return Kind(lambda value: _checked(str(value), value in names), expects, "{" + ",".join(names) + "}")


def text(metavar: str = "TEXT") -> Kind:
    """A text that is not empty; ``metavar`` FILE or FOLDER: a path, whose ``~`` is the user's home."""
    expects = {"FILE": "the path of a file", "FOLDER": "the path of a folder"}.get(metavar, "a text")

    def parse(value: Any) -> str:
        result = _checked(str(value), isinstance(value, (str, Path)) and bool(str(value)))
        return result if expects == "a text" else os.path.expanduser(result)  # in YAML no shell does

    return Kind(parse, expects, metavar)


def pattern(expression: str, expects: str, metavar: str = "NAME") -> Kind:
    """A text that the regular expression matches as a whole; ``yes`` in YAML is none unless it is quoted."""

    def parse(value: Any) -> str:
        return _checked(str(value), not isinstance(value, bool) and bool(re.fullmatch(expression, str(value))))

    return Kind(parse, expects, metavar)


def or_word(kind: Kind, word: str) -> Kind:
    """What ``kind`` reads, or ``word`` itself."""
    return Kind(lambda v: word if v == word else kind.parse(v), f"{kind.expects}, or {word}", f"{{{kind.metavar},{word}}}")


def numbers(kind: Kind, expects: str, metavar: str, lengths: Sequence[int] = ()) -> Kind:
    """Values of ``kind`` separated by commas (in YAML also a list), as a tuple; ``lengths``: how many there may be."""

    def parse(value: Any) -> tuple[Any, ...]:
        parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
        return tuple(kind.parse(part) for part in _checked(parts, not lengths or len(parts) in lengths))

    return Kind(parse, expects, metavar, several=True)


def list_of(kind: Kind, expects: str = "a list with at least one entry") -> Kind:
    """A YAML list that is not empty."""

    def parse(value: Any) -> list[Any]:
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        return [kind.parse(entry) for entry in _checked(value, is_list and len(value) > 0)]

    return Kind(parse, expects)


def mapping(*keys: str) -> Kind:
    """A YAML mapping; ``keys``: those it may have, if not any."""

    def parse(value: Any) -> dict[str, Any]:
        return dict(_checked(value, isinstance(value, Mapping) and (not keys or set(value) <= set(keys))))

    return Kind(parse, "'key: value' lines" + (f" with the keys {', '.join(keys)}" if keys else ""))


_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
BOOLEAN = Kind(lambda value: _BOOLEANS[str(value).lower()], "True or False", "BOOL", boolean=True)
ANYTHING = Kind(lambda value: value, "anything")
NAME = pattern(r"[A-Za-z0-9_][A-Za-z0-9._=-]{0,99}", "a folder name of at most 100 letters, digits, '.', '_', '=' and '-'")
DEVICE = pattern(r"auto|cpu|cuda(:\d+(,\d+)*)?", "auto, cpu, cuda, cuda:0 or cuda:0,1", "DEVICE")


def setting(default: Any, kind: Kind, help: str, short: str | None = None, **tags: Any) -> Any:
    """Declare a field of a settings class.

    Args:
        default: a value, a class that makes one (``dict``), or REQUIRED.
        help: what it is, for ``--help`` and docs/flags.md, without the default.
        short: a second, short flag.
        tags: kept in the field's metadata; ``shown``: the default as help writes it.
    """
    metadata = {"kind": kind, "help": help, "short": short, **tags}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def fields_of(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a settings class by name."""
    return {field.name: field for field in dataclasses.fields(cls)}


def parse_value(cls: type, name: str, value: Any, source: str) -> Any:
    """One value of the setting ``name``. Raises UserError, beginning with ``source`` (flag, or file and key), if impossible."""
    kind = fields_of(cls)[name].metadata["kind"]
    try:
        return kind.parse(value)
    except (ValueError, TypeError, ArithmeticError, LookupError):
        raise UserError(f"{source} is {value!r}, but must be {kind.expects}.") from None


def parse_flags(cls: type, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ``cls`` among parsed ``flags`` that were given. Raises UserError, naming the flag."""
    given = {name: flags[name] for name in fields_of(cls) if flags.get(name) is not None}
    return {name: parse_value(cls, name, value, f"--{name}") for name, value in given.items()}


def parse_mapping(cls: type, content: Mapping[Any, Any], source: str) -> dict[str, Any]:
    """The settings that a YAML file holds; blank values are left out, as BackdoorBench does.

    Raises UserError, beginning with ``source`` ("Sweep file x.yaml"), at an unknown key, an impossible value or a missing one.
    """
    fields = fields_of(cls)
    for key in content:
        if key not in fields:
            near = did_you_mean(str(key), fields)
            raise UserError(f"{source} has the unknown key {key!r}{near}; known keys: {', '.join(fields)}.")
    values = {key: parse_value(cls, key, value, f"{source}: {key}") for key, value in content.items() if value is not None}
    for name, field in fields.items():
        if field.default is field.default_factory is REQUIRED and name not in values:
            raise UserError(f"{source} has no {name}, which must be {field.metadata['kind'].expects}.")
    return values


_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][0-9_]*)$"),
    "tag:yaml.org,2002:float": re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$", re.IGNORECASE),
}


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, of which a few can stand for a value whose text fills any memory, and without keys that stand
    twice, of which YAML would take the last. ``0123`` and ``1:30`` are texts, not octal and sexagesimal numbers."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as in the base class
        first: [(tag, expression) for tag, expression in resolvers if tag not in _NUMBERS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("settings need no *aliases")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} stands twice", key.start_mark)
                names.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _expression in _NUMBERS.items():
    _PlainLoader.add_implicit_resolver(_tag, _expression, list("-+.0123456789"))


def read_yaml_mapping(path: Path, what: str) -> Mapping[Any, Any]:
    """The mapping a YAML file holds; empty if the file is.

    Raises UserError, beginning with ``what`` ("Sweep file"), if it is not readable YAML, larger than 256 KiB, or no mapping.
    """
    try:
        if path.stat().st_size > LARGEST_YAML:
            raise OSError(f"it is larger than {LARGEST_YAML >> 10} KiB")
        content = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror or error}).") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        detail = in_one_line(error, 1000)
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
    BackdoorBench's ``--amp True`` works too. ``helps`` replaces the fields' own words and default values; ``defaults``:
    whether the help states those of the others.
    """
    fields = fields_of(cls)
    for name in fields if names is None else names:
        about = fields[name].metadata
        words, default = (helps or {}).get(name, about["help"]), default_text(fields[name])
        words += f" (default {default})" if default and defaults and name not in (helps or {}) else ""
        short = [about["short"]] if about["short"] else []
        bare: dict[str, Any] = {"nargs": "?", "const": "True"} if about["kind"].boolean else {}
        metavar = about["kind"].metavar or name.rpartition("_")[2].upper()
        parser.add_argument(*short, f"--{name}", default=None, metavar=metavar, help=words.replace("%", "%%"), **bare)


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
