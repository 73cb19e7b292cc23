#!/usr/bin/env python3
"""Write docs/flags.md, which lists every flag of fmp.py and make_record.py, from where they are declared.

python record_scripts/write_flags.py
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "defense"))  # this copy, not an installed one

from fmp_core.attacks.settings import AttackSettings, RecordSettings
from fmp_core.fields import as_text, fields_of, markdown
from fmp_core.settings import DEFAULT_YAML, FIELDS, PRESETS, PROJECT, Settings, deciding_result, groups, training_settings
from fmp_core.storage.files import write_text
from fmp_core.system.cli import Parser, run_main

HEAD = f"""# Flags

*Written by `python record_scripts/write_flags.py`; a test checks that this page is up to date.*

## fmp.py

A flag overrides the preset (`--preset`), which overrides the YAML file (`--yaml_path`, default
`{DEFAULT_YAML}`; every flag below is a key of it), which overrides the defaults below.
Of a preset that the YAML file itself names, the file's other keys override what it sets, unless their value is the default
below: with `preset: strong` there, `lr: 0.05` stands, and `lr: 0.01` becomes 0.02.
A flag that is on or off needs no value: `--fresh` is `--fresh True`.
"""
UNTOUCHED = """### Flags that change no result

With other values of these flags a result, a cached score or an interrupted run still serves. What they refer to is
compared where it matters: the content of the record and the dataset, what a preset sets, the type of the device. `--chunk`
and `--memory` have exceptions ([performance](performance.md#memory)):
"""
RECORD = """## make_record.py

### The record
"""
TRAINING = """### Training

The attacked model is trained with flags that fmp.py has, too. Those that are left out come from the dataset's
recipe ([records](records.md)):
"""


def page() -> str:
    """The content of docs/flags.md."""
    parts = [HEAD]
    for title, group in groups().items():
        parts += [f"### {title[0].upper()}{title[1:]}\n", markdown(Settings, group)]
    parts.append("### Presets\n")
    for name, sets in PRESETS.items():
        flags = " ".join(f"--{key} {as_text(value)}" for key, value in sets.items())
        parts.append(f"* `{name}`: {f'`{flags}`' if flags else 'the defaults'}")
    parts += ["", UNTOUCHED, _flags(name for name in FIELDS if name not in deciding_result()) + ".\n"]
    parts += [RECORD, markdown(RecordSettings, fields_of(RecordSettings)), "### The attack\n"]
    of_training = [*training_settings(), "quiet", "log_level"]
    parts += [markdown(AttackSettings, fields_of(AttackSettings)), TRAINING, _flags(of_training) + "."]
    return "\n".join(parts) + "\n"


def _flags(names: Iterable[str]) -> str:
    return textwrap.fill(", ".join(f"`--{name}`" for name in names), 120, break_on_hyphens=False)


def main(argv: list[str] | None = None) -> int:
    Parser("write_flags", __doc__).parse_args(argv)
    return run_main("write_flags", lambda: write_text(PROJECT / "docs" / "flags.md", page()))


if __name__ == "__main__":
    sys.exit(main())
