"""The command ``fmp``: flags are parsed before torch is loaded, which takes seconds."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from fmp_core import PROJECT
from fmp_core.settings import Settings, add_arguments, changed, load_settings
from fmp_core.system.cli import Parser, from_here, run_main


def main(argv: list[str] | None = None) -> int:
    """Run the defense that the flags describe; returns the exit code."""
    parser = Parser(
        "fmp", "Remove a backdoor with Adversarial Feature Map Pruning.", usage="%(prog)s --result_file RECORD [flags]"
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    again = "the same command" + (" without --fresh" if args.fresh else "")
    return run_main("fmp", lambda: _run(args), again)


def _run(args: argparse.Namespace) -> int:
    settings = load_settings(vars(args))
    if settings.result_file is None:
        print(_what_to_run(settings))
        return 2
    import fmp  # loads torch

    from fmp_core.results.summary import as_table
    from fmp_core.system import distributed

    try:
        method = fmp.FMP(args)
        metrics = method.defense(settings.result_file)["metrics"]
    except BaseException:
        distributed.leave(failed=True)
        raise
    distributed.leave()
    if metrics and not settings.quiet:
        print(as_table(metrics, method.folder.path))
    return 0


def _what_to_run(settings: Settings) -> str:
    from fmp_core.data.attack_record import find_records  # loads torch

    names, root = find_records(settings.record_root), settings.record_root
    script, maker = Path(sys.argv[0]), PROJECT / "record_scripts" / "make_record.py"
    started = f"python {shlex.quote(sys.argv[0])}" if script.suffix == ".py" else script.name
    places, differing = ("record_root", "dataset_path", "save_folder"), changed(vars(settings))
    flags = "".join(f" --{name} {shlex.quote(differing[name])}" for name in places if name in differing)
    found = f"Records in {root}:" if names else f"There are no attack records in {root}."
    return "\n".join(
        [
            f"fmp: --result_file is missing. {found}",
            *(f"    {started} --result_file {shlex.quote(name)}{flags}" for name in names),
            f"To make one of scikit-learn's digits: python {from_here(maker)}",
        ]
    )
