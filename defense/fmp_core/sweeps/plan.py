"""A sweep file -> the jobs it asks for: records to make, then defenses x settings x seeds on each of them."""

from __future__ import annotations

import itertools
import re
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fmp_core.errors import UserError
from fmp_core.settings import FIELDS, PROJECT, Settings, load_settings
from fmp_core.sweeps.jobs import Job

OURS = {"fmp": "frg", "ft-only": "none", "random-prune": "random"}  # name in a sweep -> --selection
SLURM_KEYS = {"partition", "time", "gpus", "cpus", "memory_gb", "account", "qos", "constraint", "setup", "at_once"}
# Settings that say where a run happens or what it is called, and so do not change its result.
PLACES = {"result_file", "record_root", "dataset_path", "device", "log", "checkpoint_save", "defense_name", "checkpoint_load"}
PLACES |= {"num_workers", "pin_memory", "non_blocking", "prefetch", "chunk", "memory", "fresh", "frequency_save"}
# Settings a ranking does not depend on; jobs equal in all others (and in the record) share one.
AFTER_RANKING = {"p", "scope", "epochs", "batch_size", "lr", "lr_scheduler", "steplr_stepsize", "steplr_gamma", "wd", "amp"}
AFTER_RANKING |= {"steplr_milestones", "client_optimizer", "sgd_momentum", "frequency_test", "dataset", "model", "num_classes"}
AFTER_RANKING |= {"masked", "unlearn", "distill", "budget"}


@dataclass(frozen=True)
class Sweep:
    """A sweep file. Every field is a key of it; see docs/sweeps.md."""

    name: str
    records: Sequence[Any]
    defenses: Sequence[Any]
    seeds: Sequence[int] = (0,)
    record_root: str = "./record"
    dataset_path: str = "./data"
    device: str = "auto"
    workers: int = 1
    processes: int = 1
    timeout: float | None = None  # minutes per job
    ours: Mapping[str, Any] = field(default_factory=dict)
    backdoorbench: str | None = None
    slurm: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Logs and locks of the sweep."""
        return Path("sweeps") / self.name


def read_sweep(path: str | Path) -> Sweep:
    """Read a sweep file.

    Raises:
        UserError: not readable, an unknown key or an impossible value.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"Sweep file {path} cannot be read as YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, Mapping):
        raise UserError(f"Sweep file {path} must hold 'key: value' lines, at least records and defenses.")
    return make_sweep({"name": Path(path).stem, **content}, f"Sweep file {path}")


def make_sweep(content: Mapping[str, Any], source: str) -> Sweep:
    """A Sweep from the mapping a sweep file holds. Raises UserError, beginning with ``source``."""
    for key in content:
        if key not in Sweep.__dataclass_fields__:
            raise UserError(f"{source} has the unknown key {key!r}; known keys: {', '.join(Sweep.__dataclass_fields__)}.")
    for key in ("records", "defenses", "seeds"):
        value = content.get(key, [0])
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise UserError(f"{source}: {key} must be a list with at least one entry.")
    for key in ("ours", "slurm"):
        if not isinstance(content.get(key, {}), Mapping):
            raise UserError(f"{source}: {key} must hold 'key: value' lines.")
    for key in ("workers", "processes"):
        if not isinstance(content.get(key, 1), int) or content.get(key, 1) < 1:
            raise UserError(f"{source}: {key} is {content[key]!r}, but must be a whole number of at least 1.")
    timeout = content.get("timeout")
    if timeout is not None and not (isinstance(timeout, (int, float)) and timeout > 0):
        raise UserError(f"{source}: timeout is {timeout!r}, but must be minutes above 0.")
    if any(not isinstance(seed, int) or isinstance(seed, bool) or seed < 0 for seed in content.get("seeds", [0])):
        raise UserError(f"{source}: seeds must be whole numbers of at least 0.")
    if not re.fullmatch(r"\w[\w.-]*", str(content["name"])):
        raise UserError(f"{source}: name {content['name']!r} must be letters, digits, '-', '_' or '.'; it names a folder.")
    unknown = set(content.get("slurm", {})) - SLURM_KEYS
    if unknown:
        raise UserError(f"{source}: slurm has the unknown key {min(unknown)!r}; known keys: {', '.join(sorted(SLURM_KEYS))}.")
    return Sweep(**content)


def plan(sweep: Sweep) -> list[Job]:
    """All jobs of a sweep, records first.

    Raises:
        UserError: a setting is unknown or impossible, or two jobs would write the same folder.
    """
    records = [job for entry in sweep.records for job in _record_jobs(sweep, entry)]
    jobs = [job for job in records if job.command]
    for record in dict.fromkeys(job.record for job in records):
        for entry in sweep.defenses:
            for seed in sweep.seeds:
                jobs += _defense_jobs(sweep, record, entry, seed)
    _check_distinct(jobs)
    return jobs


def _check_distinct(jobs: Sequence[Job]) -> None:
    seen: set[Path] = set()
    for job in jobs:
        if job.folder in seen:
            raise UserError(
                f"Two jobs of the sweep would write {job.folder}; give one of them another name: in the sweep file."
            )
        seen.add(job.folder)


def _expand(entry: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every combination of the keys that hold a list, with the part of it that varies."""
    varied = {key: value for key, value in entry.items() if isinstance(value, list)}
    for values in itertools.product(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        yield {**entry, **chosen}, chosen


def _suffix(chosen: Mapping[str, Any]) -> str:
    return "".join(f"-{key}{re.sub(r'[^0-9A-Za-z.]', '_', str(value))}" for key, value in chosen.items())


def _record_jobs(sweep: Sweep, entry: Any) -> Iterator[Job]:
    """A job per record to make; a record that is only named gets a job without a command."""
    root = Path(sweep.record_root)
    if isinstance(entry, str):
        yield Job(record=entry, kind="record", method="record", seed=None, folder=root / entry, command=(), settings={})
        return
    if not isinstance(entry, Mapping):
        raise UserError(f"records: {entry!r} is neither the name of a record nor flags of make_record.py.")
    for flags, chosen in _expand(entry):
        known = {"attack": "badnet", "dataset": "digits", **flags}
        pattern = flags.pop("name", None)
        fields = [name for _, name, _, _ in string.Formatter().parse(pattern)] if pattern else []
        if any(name is not None and name not in known for name in fields):
            raise UserError(f"records: name {pattern!r} may only use {', '.join(f'{{{key}}}' for key in known)}.")
        varied = {key: value for key, value in chosen.items() if key not in ("attack", "dataset")}
        name = pattern.format(**known) if pattern else f"{known['attack']}_{known['dataset']}{_suffix(varied)}"
        where = {"save_folder_name": name, "record_root": sweep.record_root, "dataset_path": sweep.dataset_path}
        command = [sys.executable, str(PROJECT / "record_scripts" / "make_record.py"), *_flags({**flags, **where})]
        command += ["--device", sweep.device]
        yield Job(
            record=name,
            kind="record",
            method="record",
            seed=None,
            folder=root / name,
            command=tuple(command),
            settings=flags,
        )


def _defense_jobs(sweep: Sweep, record: str, entry: Any, seed: int) -> Iterator[Job]:
    entry = {"defense": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping) or not isinstance(entry.get("defense"), str):
        raise UserError(f"defenses: {entry!r} is neither the name of a defense nor a mapping with the key defense.")
    for flags, chosen in _expand(entry):
        defense = flags.pop("defense")
        pattern = flags.pop("name", defense)
        method = f"{pattern}{_suffix(chosen)}"
        if not re.fullmatch(r"\w[\w.-]*", method):
            raise UserError(f"defenses: name {method!r} must be letters, digits, '-', '_' or '.'; it names a folder.")
        make = _our_job if defense in OURS else _bb_job
        yield make(sweep, record, defense, method, flags, seed)


def _our_job(sweep: Sweep, record: str, defense: str, method: str, flags: Mapping[str, Any], seed: int) -> Job:
    flags = {**sweep.ours, **flags, "random_seed": seed}
    flags |= {"selection": OURS[defense]} if defense != "fmp" else {}
    for key in flags:
        if key not in {*FIELDS, "yaml_path"} or key in PLACES - {"chunk", "memory", "fresh"}:
            raise UserError(f"defenses: {key!r} is not a setting of {defense} that a sweep can give.")
    settings = load_settings(flags)
    folder = Path(sweep.record_root) / record / "defense" / (method + _seed_suffix(seed))
    where = {"result_file": record, "record_root": sweep.record_root, "dataset_path": sweep.dataset_path}
    where |= {"device": sweep.device} | ({"defense_name": folder.name} if folder.name != "fmp" else {})
    start = [sys.executable]
    if sweep.processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={sweep.processes}"]
    return Job(
        record=record,
        kind="ours",
        method=method,
        seed=seed,
        folder=folder,
        command=(*start, str(PROJECT / "defense" / "fmp.py"), *_flags({**where, **flags})),
        settings={name: getattr(settings, name) for name in FIELDS if name not in PLACES},
        ranking=_ranking_key(record, settings),
    )


def _ranking_key(record: str, settings: Settings) -> str | None:
    """Jobs of one key read the scores that the first of them saved; None where nothing is ranked or shared."""
    if settings.selection != "frg" or settings.fresh:
        return None
    ignored = (PLACES | AFTER_RANKING) - ({"p", "scope"} if settings.ranking == "racing" else set())
    return " ".join([record, *(str(getattr(settings, name)) for name in FIELDS if name not in ignored)])


def _bb_job(sweep: Sweep, record: str, defense: str, method: str, flags: Mapping[str, Any], seed: int) -> Job:
    if sweep.backdoorbench is None:
        raise UserError(
            f"defenses: {defense} is none of ours ({', '.join(OURS)}), so it is BackdoorBench's; "
            "the sweep needs the key backdoorbench: the folder of a checkout."
        )
    if not (Path(sweep.backdoorbench) / "defense" / f"{defense}.py").is_file():
        raise UserError(f"defenses: there is no {sweep.backdoorbench}/defense/{defense}.py; check backdoorbench and the name.")
    results = Path(sweep.record_root) / record / "defense"
    flags = {**flags, "random_seed": seed}
    command = [sys.executable, str(PROJECT / "record_scripts" / "run_defense.py"), "--backdoorbench", sweep.backdoorbench]
    command += ["--defense", defense, "--result_file", record, "--record_root", sweep.record_root]
    command += ["--dataset_path", sweep.dataset_path, "--device", sweep.device, "--", *_flags(flags)]
    return Job(
        record=record,
        kind="backdoorbench",
        method=method,
        seed=seed,
        folder=results / (method + _seed_suffix(seed)),
        command=tuple(command),
        settings={"defense": defense, **flags},
        writes=results / defense,
    )


def _seed_suffix(seed: int) -> str:
    return f"-s{seed}" if seed else ""


def _flags(values: Mapping[str, Any]) -> list[str]:
    given = {key: value for key, value in values.items() if value is not None}
    texts = {key: ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value) for key, value in given.items()}
    return [text for key, value in texts.items() for text in (f"--{key}", value)]
