"""Runs the command on prepared workplaces under an audit hook: ``python watched.py CASES.json`` prints one JSON line a case.

CASES.json: ``[[name, folder, [flags]], ...]``. A line: name, code, out, err, seconds, kilobytes (peak resident memory), events
(processes, sockets, writing, foreign code), modules (imported meanwhile).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "defense")]

from fmp_core import command  # noqa: E402
from PIL import Image  # noqa: E402

Image.init()  # imports Pillow's plugins, which define named tuples by exec

FORBIDDEN = [
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
    "subprocess.Popen",
    "socket.",
    "urllib.",
    "ctypes.",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.utime",
    "shutil.",
    "tempfile.",
    "pickle.",
]
events: list[str] = []
watching = False


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not watching:
        return
    if event.startswith(tuple(FORBIDDEN)):
        events.append(f"{event} {arguments!r:.200}")
    elif event == "open" and (str(arguments[1] or "r").strip("rbtU") or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
        events.append(f"open {arguments!r:.200}")
    elif event == "exec" and isinstance(arguments[0], CodeType) and arguments[0].co_filename == "<string>":
        events.append(f"exec {arguments!r:.200}")


def peak(reset: bool = False) -> int:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def run(name: str, folder: str, flags: list[str]) -> dict[str, Any]:
    global watching
    os.chdir(folder)
    events.clear()
    modules = set(sys.modules)
    out, err = io.StringIO(), io.StringIO()
    peak(reset=True)
    started = time.process_time()  # of the processor: a loaded machine is not our fault
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        watching = True
        try:
            code = command.main(flags)
        except BaseException as error:  # reported, so that the test can name the case
            code = repr(error)[:300]
        watching = False
    seconds = time.process_time() - started
    report = {"name": name, "code": code, "out": out.getvalue(), "err": err.getvalue(), "seconds": seconds}
    return report | {"kilobytes": peak(), "events": events, "modules": sorted(set(sys.modules) - modules)}


if __name__ == "__main__":
    sys.addaudithook(hook)
    for case in json.loads(Path(sys.argv[1]).read_text()):
        print(json.dumps(run(*case)), flush=True)
