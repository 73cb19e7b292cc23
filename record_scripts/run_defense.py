#!/usr/bin/env python3
"""Run BackdoorBench's own defenses and analyses on a record, on today's torch and numpy; no file of it is touched.

    python record_scripts/run_defense.py --backdoorbench ~/BackdoorBench --defense ft --result_file badnet -- --epochs 10
    python record_scripts/run_defense.py --backdoorbench ~/BackdoorBench --defense fmp --analysis tsne --result_file badnet

The first runs ``defense/ft.py``. The second runs ``analysis/visual_tsne.py`` on what a defense, here FMP, made of the record.
Dataset and model are taken from the record. What follows ``--`` is handed to BackdoorBench's script as it is. Results lie
where BackdoorBench puts them, ``record/<name>/defense/<method>/``, with all that was printed in ``run_defense.log`` (or
``visual_tsne.log``). The exit code is the script's, or 2 if it could not be started.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "defense"))

from fmp_core.backdoorbench.workspace import Ended, Job, open_job, run_script, workspace
from fmp_core.errors import UserError
from fmp_core.storage.files import make_folders, refuse_links_out_of
from fmp_core.system.devices import choose_device

ROOT = Path(__file__).absolute().parents[1]  # a BackdoorBench checkout, if install.py put this script there
NO_DEFENSES = {"__init__", "base", "dataset_load_mode", "fmp"}  # of defense/*.py
RESULT = "defense_result.pt"


def find_script(checkout: Path, folder: str, prefix: str, name: str) -> str:
    """``folder/<prefix><name>.py`` of the checkout. Raises UserError naming those there are."""
    stems = {path.stem for path in (checkout / folder).glob(f"{prefix}*.py")} - NO_DEFENSES
    names = sorted(stem.removeprefix(prefix) for stem in stems)
    if name not in names:
        raise UserError(f"{checkout / folder} has no {prefix}{name}.py to run; there are {', '.join(names)}.")
    return f"{folder}/{prefix}{name}.py"


def run_defense(job: Job, method: str, device: str, python: str, extra: list[str]) -> tuple[Ended, Path]:
    """Run ``defense/<method>.py`` on the record; how it ended, and its log.

    Raises:
        UserError: BackdoorBench has no such defense, or cannot be given the record.
    """
    script = find_script(job.checkout, "defense", "", method)
    return _run(job, script, method, "run_defense.log", ["--result_file", job.name], device, python, extra)


def run_analysis(job: Job, method: str, analysis: str, device: str, python: str, extra: list[str]) -> tuple[Ended, Path]:
    """Run ``analysis/visual_<analysis>.py`` on what ``method`` made of the record; how it ended, and its log.

    Raises:
        UserError: there is no such analysis or no result of ``method``, or BackdoorBench cannot be given the record.
    """
    script = find_script(job.checkout, "analysis", "visual_", analysis)
    result = job.record.folder / "defense" / method / RESULT
    if not result.is_file():
        raise UserError(f"There is no {result} to analyse; run the defense {method} first.")
    names = ["--result_file_attack", job.name, "--result_file_defense", f"{job.name}/defense/{method}"]
    return _run(job, script, method, f"visual_{analysis}.log", names, device, python, extra)


def _run(
    job: Job, script: str, method: str, log: str, names: list[str], device: str, python: str, extra: list[str]
) -> tuple[Ended, Path]:
    results = job.record.folder / "defense" / method
    refuse_links_out_of(job.record.folder, results, results / log)
    facts = ["--dataset", job.record.dataset, "--model", job.record.model_name, "--device", device]
    with workspace(job) as folder:
        make_folders(results)
        ended = run_script(folder, script, [*facts, *names, *extra], device=device, python=python, log=results / log)
    return ended, results / log


def verdict(script: str, ended: Ended, log: Path, started: float | None) -> tuple[str, int]:
    """One sentence on how it went, and the exit code. With ``started`` (seconds since the epoch), ending without a
    ``defense_result.pt`` younger than that is a failure too."""
    results = log.parent
    if ended.code:
        reason = f" ({ended.last_error})" if ended.last_error else ""
        return f"BackdoorBench's {script} did not run to its end: exit code {ended.code}{reason}; see {log}", ended.code
    said = f"BackdoorBench's {script} ended after {ended.seconds:.0f} s"
    if started is None:
        return f"{said}; results are below {results}", 0
    if not (results / RESULT).is_file() or (results / RESULT).stat().st_mtime < started:
        return f"{said} but wrote no {results / RESULT}; see {log}", 1
    tables = sorted(str(path.relative_to(results)) for path in results.rglob("*.csv"))
    return f"{said}; in {results} are {', '.join([RESULT, *tables])}", 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backdoorbench", default=str(ROOT), help="root of a checkout (default: around this script)")
    parser.add_argument("--defense", required=True, help="ft, fp, clp, anp, nc, nad, rnp, ft-sam, i-bau, sau, npd, ...")
    parser.add_argument("--analysis", help="cm, metric, network, tac, tsne, ...: analyse the result that --defense has left")
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
        device = str(choose_device(args.device).device) if args.device == "auto" else args.device
        job = open_job(args.backdoorbench, args.record_root, args.result_file, args.dataset_path)
        if args.analysis:
            ended, log = run_analysis(job, args.defense, args.analysis, device, args.python, args.extra)
            message, code = verdict(f"analysis {args.analysis}", ended, log, None)
        else:
            ended, log = run_defense(job, args.defense, device, args.python, args.extra)
            message, code = verdict(args.defense, ended, log, started)
    except UserError as error:
        print(f"run_defense: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("run_defense: interrupted", file=sys.stderr)
        return 130
    print(f"run_defense: {message}", file=sys.stderr if code else sys.stdout)
    return code


if __name__ == "__main__":
    sys.exit(main())
