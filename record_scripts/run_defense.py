#!/usr/bin/env python3
"""Run one of BackdoorBench's own defenses on a record, on today's torch and numpy; no file of BackdoorBench is touched.

    python record_scripts/run_defense.py --backdoorbench ~/BackdoorBench --defense ft --result_file badnet -- --epochs 10

Dataset and model are taken from the record. What follows ``--`` is handed to BackdoorBench's script as it is. Results lie
where BackdoorBench puts them, ``record/<name>/defense/<method>/``, with all that was printed in ``run_defense.log``. The exit
code is the script's, or 2 if it could not be started.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "defense"))

from bb_workspace import Ended, Job, open_job, run_script, workspace
from fmp_core.compute import choose_compute
from fmp_core.errors import UserError
from fmp_core.files import make_folders

ROOT = Path(__file__).resolve().parents[1]  # a BackdoorBench checkout, if install.py put this script there
LOG = "run_defense.log"


def find_script(checkout: Path, method: str) -> str:
    """``defense/<method>.py``. Raises UserError naming those there are."""
    scripts = {path.stem for path in (checkout / "defense").glob("*.py")} - {"__init__", "base", "dataset_load_mode", "fmp"}
    if method not in scripts:
        raise UserError(f"--defense {method} is not in {checkout / 'defense'}; there are {', '.join(sorted(scripts))}.")
    return f"defense/{method}.py"


def run_defense(job: Job, method: str, device: str, python: str, extra: list[str]) -> tuple[Ended, Path]:
    """Run it, and return how it ended and its result folder.

    Raises:
        UserError: BackdoorBench has no such defense, or cannot be given the record.
    """
    script = find_script(job.checkout, method)
    results = job.record.folder / "defense" / method
    record = {"--dataset": job.record.dataset, "--model": job.record.model_name, "--result_file": job.name, "--device": device}
    arguments = [part for pair in record.items() for part in pair] + extra
    with workspace(job) as folder:
        make_folders(results)
        return run_script(folder, script, arguments, device=device, python=python, log=results / LOG), results


def verdict(method: str, ended: Ended, results: Path, started: float) -> tuple[str, int]:
    """One sentence on how it went, and the exit code. Ending without a fresh ``defense_result.pt`` is a failure too."""
    result = results / "defense_result.pt"
    if ended.code:
        reason = f" ({ended.last_error})" if ended.last_error else ""
        said = f"exit code {ended.code}{reason}; see {results / LOG}"
        return f"BackdoorBench's {method} did not run to its end: {said}", ended.code
    if not result.is_file() or result.stat().st_mtime < started:
        return f"BackdoorBench's {method} ended after {ended.seconds:.0f} s but wrote no {result}; see {results / LOG}", 1
    tables = ", ".join(sorted(str(path.relative_to(results)) for path in results.rglob("*.csv")))
    return f"BackdoorBench's {method} ended after {ended.seconds:.0f} s; {results}: defense_result.pt, {tables}", 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backdoorbench", default=str(ROOT), help="root of a BackdoorBench checkout (default: around this script)"
    )
    parser.add_argument("--defense", required=True, help="ft, fp, clp, anp, nc, nad, rnp, ft-sam, i-bau, sau, npd, ...")
    parser.add_argument("--result_file", required=True, help="the record: a folder below --record_root")
    parser.add_argument("--record_root", default="./record")
    parser.add_argument("--dataset_path", default="./data")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:0 ...")
    parser.add_argument("--python", default=sys.executable, help="the Python that runs BackdoorBench (default: this one)")
    parser.add_argument("extra", nargs="*", metavar="-- FLAGS", help="flags for BackdoorBench's script")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a kill ends BackdoorBench's process too
    started = time.time() - 1  # file systems with coarse clocks
    try:
        device = str(choose_compute(args.device).device) if args.device == "auto" else args.device
        job = open_job(args.backdoorbench, args.record_root, args.result_file, args.dataset_path)
        ended, results = run_defense(job, args.defense, device, args.python, args.extra)
    except UserError as error:
        print(f"run_defense: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("run_defense: interrupted", file=sys.stderr)
        return 130
    message, code = verdict(args.defense, ended, results, started)
    print(f"run_defense: {message}", file=sys.stderr if code else sys.stdout)
    return code


if __name__ == "__main__":
    sys.exit(main())
