"""One job of a sweep: is it done, run it, stamp its result. The same function runs on this machine and on a Slurm node."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fmp_core.data.names import ATTACK_FILE, DEFENSE_FILE
from fmp_core.errors import UserError
from fmp_core.results.read import STAMP, SWEEP_MARK, Result, read_result, read_stamp
from fmp_core.storage.files import aside_by_sweep, bring_back, file_digest, put_aside, write_json, write_text
from fmp_core.storage.lock import locked, result_lock
from fmp_core.system import processes

GRACE = 2 * processes.GRACE  # seconds that a job has to leave its files in order, and to stop what it has started itself
_running: set[subprocess.Popen[bytes]] = set()
_stopping = threading.Event()  # since stop_all(): jobs that wait for a lock do not start any more


@dataclass(frozen=True)
class Job:
    """A command and the folder its result appears in. ``settings`` is what decides the result."""

    record: str
    kind: str  # record, ours or backdoorbench
    method: str  # the name of the result without its seed
    seed: int | None
    folder: Path
    command: tuple[str, ...]
    settings: Mapping[str, Any]
    shared_work: str | None = None  # equal in jobs of which the first saves scores or triggers that the others read
    writes: Path | None = None  # where a BB defense writes, whatever we call the result

    @property
    def name(self) -> str:
        """What its log and lock are called; records may lie in folders of records."""
        return f"{self.record.replace('/', '_')}.{self.folder.name if self.kind != 'record' else 'record'}"

    @property
    def output(self) -> Path:
        """Where its command writes; ``folder`` but for a BB defense whose result has another name."""
        return self.writes or self.folder

    @property
    def attack_file(self) -> Path:
        """What the job makes, if it is to make a record, or what it defends."""
        return (self.folder if self.kind == "record" else self.folder.parents[1]) / ATTACK_FILE


@dataclass(frozen=True)
class Outcome:
    """``result`` is None for a record, and for a failure, where ``problem`` is one line."""

    seconds: float
    problem: str | None = None
    result: Result | None = None


def settings_hash(job: Job) -> str:
    """SHA-256 over what decides the result: the settings, files that they name and, for a defense, the record's content."""
    content = _content_hash(job.attack_file) if job.kind != "record" else None
    named = {key: _content_hash(Path(value)) for key, value in job.settings.items() if isinstance(value, str)}
    about = {"kind": job.kind, "settings": dict(job.settings), "files": named, "record": content}
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def _content_hash(path: Path) -> str | None:
    """None if there is no such file; a long text is no name of one."""
    try:
        state = path.stat()
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(state.st_mode):
        return None
    return _hash_of_state(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1024)
def _hash_of_state(path: Path, _size: int, _time_ns: int) -> str:
    return file_digest(path)


def finished(job: Job) -> Outcome | None:
    """The outcome of a job that needs no run: its result is whole, and a sweep made it with the same settings; else None.

    A record that exists without a stamp was made by hand, and is taken as it is.
    """
    stamp = read_stamp(job.folder)
    if job.kind == "record":
        return Outcome(float(stamp.get("seconds", 0))) if job.attack_file.is_file() else None
    if stamp.get("hash") != settings_hash(job) or not (job.folder / DEFENSE_FILE).is_file():
        return None
    try:
        result = read_result(job.folder)
    except UserError:
        return None
    return Outcome(float(stamp["seconds"]), result=result) if result.stamped else None


def made_otherwise(job: Job) -> str | None:
    """A sentence, if the record of ``job`` is there and a sweep made it with other settings."""
    if not (stamp := read_stamp(job.folder)) or stamp.get("hash") == settings_hash(job):
        return None
    return f"{job.folder} was made with other settings; remove it, or give the new record another name."


def run(job: Job, sweep: Path, environment: Mapping[str, str], timeout: float | None = None) -> Outcome:
    """Run ``job`` unless it is done; what it prints goes to ``<sweep>/logs/<name>.log``. Never raises for a failing job.

    ``environment`` is added to this process's own; after ``timeout`` seconds the job counts as failed.
    """
    if job.kind != "record" and not job.attack_file.is_file():
        return Outcome(0, f"there is no attack record in {job.attack_file.parent}")
    try:
        with locked(job.output.parent, True, name=result_lock(job.output), give_up=_stopping.is_set):  # other sweeps write, too
            if _stopping.is_set():
                return Outcome(0, "interrupted")
            return _run_alone(job, sweep, environment, timeout)
    except UserError as error:
        return Outcome(0, str(error))


def _run_alone(job: Job, sweep: Path, environment: Mapping[str, str], timeout: float | None) -> Outcome:
    _bring_back(job)
    if done := finished(job):
        problem = made_otherwise(job) if job.kind == "record" else None  # by a sweep that we have waited for
        return replace(done, problem=problem)
    stamp: dict[str, Any] = {"hash": settings_hash(job), "method": job.method, "seed": job.seed}
    started = time.monotonic()
    log, failed = sweep / "logs" / f"{job.name}.log", sweep / "failed" / job.name
    try:
        with _kept_apart(job, failed):
            result = _run_to_end(job, log, {SWEEP_MARK: str(sweep.resolve()), **environment}, timeout)
            seconds = time.monotonic() - started
            stamp |= {"source": file_digest(Path(result.source))} if result else {}
            stamp |= {"seconds": round(seconds, 1), "command": list(job.command), "settings": dict(job.settings)}
            write_json(job.output / STAMP, stamp)
    except (UserError, OSError) as error:
        problem = str(error)
        if job.writes and failed.exists():  # the problem, and the log, name what the run left as it is now
            with contextlib.suppress(OSError), open(log, "a", encoding="utf-8") as file:
                file.write(f"sweep: what {job.writes} held is now in {failed}\n")
            for moved in (job.writes.resolve(), job.writes):
                problem = re.sub(rf"{re.escape(str(moved))}(?![\w.-])", str(failed), problem)
            problem += f" (what it left: {failed})"
        return Outcome(time.monotonic() - started, problem)
    return Outcome(seconds, result=result)


def _bring_back(job: Job) -> None:
    """Put back what a run that was killed had put aside."""
    if job.writes:
        bring_back(job.writes, aside_by_sweep(job.writes), STAMP if job.writes == job.folder else None)


@contextlib.contextmanager
def _kept_apart(job: Job, failed: Path) -> Iterator[None]:
    """Take the stamp off the old result; put a BB result that stands in ``writes`` aside, and back unless it is replaced.

    What a failing run of BB leaves, its log among it, goes to ``failed``.
    """
    (job.folder / STAMP).unlink(missing_ok=True)
    if job.writes is None:
        yield
        return
    with put_aside(job.writes, aside_by_sweep(job.writes)) as earlier:
        try:
            yield
            if job.writes != job.folder:
                shutil.rmtree(job.folder, ignore_errors=True)
                job.writes.rename(job.folder)
            else:
                earlier.replaced = True
        except BaseException:
            shutil.rmtree(failed, ignore_errors=True)
            if job.writes.exists():
                failed.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(job.writes, failed)
            raise


def _run_to_end(job: Job, log: Path, environment: Mapping[str, str], timeout: float | None) -> Result | None:
    """The result, None of a record. Raises UserError: the command failed, or left no result."""
    write_text(log, f"$ {shlex.join(job.command)}\n")
    with open(log, "ab") as file:
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,  # so that the job's own children can be stopped with it
        )
    _running.add(process)
    try:
        if _stopping.is_set():  # by a stop_all() that did not see this process yet
            raise UserError("interrupted")
        code = process.wait(timeout)
        problem = f"exit code {code}" if code else None
    except subprocess.TimeoutExpired:
        problem = f"stopped after {timeout:.0f} s"
    finally:
        processes.stop([process], GRACE)
        _running.discard(process)
    if problem:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
        last = next((" ".join(line.split())[:400] for line in reversed(lines) if line.strip()), "it printed nothing")
        raise UserError(f"{problem}: {last} (log: {log})")
    return read_result(job.output) if job.kind != "record" else None


def stop_all() -> None:
    """Stop every job that this process runs, and start no other until :func:`allow_jobs`."""
    _stopping.set()
    processes.stop(list(_running), GRACE)


def allow_jobs() -> None:
    """Undo what :func:`stop_all` does to jobs that start later."""
    _stopping.clear()


def stop_leftovers(sweep: Path) -> int:
    """Stop, as :func:`stop_all` does, what a killed sweep of this folder left running on this machine (found by its mark);
    how many there were."""
    left = stopped = _marked(sweep)
    _kill(left, signal.SIGTERM)
    end = time.monotonic() + GRACE
    while left and time.monotonic() < end:
        time.sleep(0.1)
        left = left & _marked(sweep)
    _kill(left, signal.SIGKILL)
    return len(stopped)


def _kill(numbers: Collection[int], kind: signal.Signals) -> None:
    for number in numbers:
        with contextlib.suppress(OSError):
            os.kill(number, kind)


def _marked(sweep: Path) -> set[int]:
    """The processes that jobs of this sweep are, but for this one."""
    mark, found = f"{SWEEP_MARK}={sweep.resolve()}".encode(), set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(process.name) != os.getpid() and mark in (process / "environ").read_bytes().split(b"\0"):
                found.add(int(process.name))
    return found
