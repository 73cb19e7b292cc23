"""Jobs that stand for defenses in the tests of sweeps: small, and they note when they begin and end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fmp_core.sweeps.jobs import Job, Outcome
from fmp_core.sweeps.local import run_local
from fmp_core.sweeps.plan import Sweep, make_sweep

# Stands for a defense: says when it began, takes a while, and leaves whole results.
WORK = """
import json, pathlib, sys, time
folder, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
with open("order.txt", "a") as file: file.write(folder.name + " begins\\n")
time.sleep(seconds)
after = {"test_acc": 0.9, "test_asr": 0.1, "test_ra": 0.8}
(folder / "metrics.json").write_text(json.dumps({"after": after}))
(folder / "defense_result.pt").write_bytes(b"")
with open("order.txt", "a") as file: file.write(folder.name + " ends\\n")
"""


# Begins a job that leaves a file when it is asked to end.
LEAVING = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(pathlib.Path("left in order").touch() or 1))
"""


def wait_for(condition: Callable[[], bool], otherwise: str, seconds: float = 600) -> None:
    """Wait until ``condition`` holds; fail with the sentence ``otherwise`` where even a busy machine would have got there."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, otherwise
        time.sleep(0.05)


def sweep_of(**keys: Any) -> Sweep:
    return make_sweep({"name": "s", "records": ["r"], "defenses": ["fmp"], "device": "cpu", **keys}, "test")


def working(name: str, seconds: float = 0, code: str = WORK, **keys: Any) -> Job:
    folder = Path("record/r/defense") / name
    command = (sys.executable, "-c", code, str(folder), str(seconds))
    settings = {"seconds": seconds}
    return Job(record="r", kind="ours", method=name, seed=0, folder=folder, command=command, settings=settings, **keys)


def order() -> list[str]:
    return Path("order.txt").read_text().splitlines()


def run_all(jobs: list[Job], workers: int = 2, timeout: float | None = None) -> dict[str, Outcome]:
    ended: dict[str, Outcome] = {}
    slots: list[Mapping[str, str]] = [{} for _ in range(workers)]
    run_local(jobs, Path("sweeps/s"), slots, lambda job, outcome: ended.update({job.folder.name: outcome}), timeout)
    return ended
