"""A sweep file -> the jobs it asks for: records to make, then defenses x settings x seeds on each of them."""

from __future__ import annotations

import itertools
import re
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmp_core import fields
from fmp_core.attacks.settings import AttackSettings, RecordSettings
from fmp_core.errors import UserError
from fmp_core.fields import ANYTHING, REQUIRED, integer, list_of, mapping, number, pattern, setting, text
from fmp_core.results.read import BB_DATASETS
from fmp_core.settings import (
    FIELDS,
    PROJECT,
    Settings,
    Stage,
    deciding_inversion,
    deciding_ranking,
    deciding_result,
    load_settings,
    names,
    training_settings,
)
from fmp_core.sweeps.jobs import Job

OURS = {"fmp": "frg", "ft-only": "none", "random-prune": "random"}  # name in a sweep -> --selection
GIVEN = {*names(Stage.NAMING, Stage.NO_EFFECT, decides=False), "device"}  # settings that the sweep itself gives, or nobody
FOLDER_NAME = r"\w[\w.-]*"
SLURM_KEYS = ("partition", "time", "gpus", "cpus", "memory_gb", "account", "qos", "constraint", "setup", "at_once")


@dataclass(frozen=True)
class Sweep:
    """A sweep file. Every field is a key of it; see docs/sweeps.md."""

    name: str = setting(
        REQUIRED, pattern(FOLDER_NAME, "letters, digits, '-', '_' or '.'; it names a folder"), "the folder below sweeps/"
    )
    records: Sequence[Any] = setting(REQUIRED, list_of(ANYTHING), "names of records, or flags of make_record.py")
    defenses: Sequence[Any] = setting(REQUIRED, list_of(ANYTHING), "names of defenses, or a name and settings")
    seeds: Sequence[int] = setting((0,), list_of(integer(0), "a list of whole numbers of at least 0"), "random_seed")
    ratio: float | None = setting(None, number(0, 1, above=True), "share of clean data, ours and BackdoorBench's")
    record_root: str = setting("./record", text("FOLDER"), "the folder of attack records")
    dataset_path: str = setting("./data", text("FOLDER"), "the folder of datasets")
    device: str = setting("auto", text("DEVICE"), "as for fmp.py")
    workers: int = setting(1, integer(1), "jobs at a time on the CPU")
    processes: int = setting(1, integer(1), "processes of each of our runs, under torchrun")
    timeout: float | None = setting(None, number(0, above=True), "minutes after which a job counts as failed")
    ours: Mapping[str, Any] = setting(dict, mapping(), "settings of all of our defenses")
    backdoorbench: str | None = setting(None, text("FOLDER"), "root of a checkout; runs BackdoorBench's defenses")
    slurm: Mapping[str, Any] = setting(dict, mapping(*SLURM_KEYS), "what sbatch is asked for")

    @property
    def folder(self) -> Path:
        """Logs and locks of the sweep."""
        return Path("sweeps") / self.name


def read_sweep(path: str | Path) -> Sweep:
    """Read a sweep file.

    Raises:
        UserError: not readable, an unknown key or an impossible value.
    """
    content = fields.read_yaml_mapping(Path(path), "Sweep file")
    return make_sweep({"name": Path(path).stem, **content}, f"Sweep file {path}")


def make_sweep(content: Mapping[str, Any], source: str) -> Sweep:
    """A Sweep from the mapping a sweep file holds. Raises UserError, beginning with ``source``."""
    sweep = Sweep(**fields.parse_mapping(Sweep, content, source))
    if sweep.ratio is not None and "ratio" in sweep.ours:
        raise UserError(f"{source}: ratio is said twice, for all defenses and in ours; leave one out.")
    return sweep


def plan(sweep: Sweep) -> list[Job]:
    """All jobs of a sweep, records first.

    Raises:
        UserError: a setting is unknown or impossible, two jobs would write the same folder, or BackdoorBench's defenses are
            asked to run on a dataset that it does not know.
    """
    records = [job for entry in sweep.records for job in _record_jobs(sweep, entry)]
    jobs = [job for job in records if job.command]
    for record in dict.fromkeys(job.record for job in records):
        for entry in sweep.defenses:
            for seed in sweep.seeds:
                jobs += _defense_jobs(sweep, record, entry, seed)
    _check_distinct(jobs)
    _check_datasets(jobs)
    return jobs


def _check_datasets(jobs: Sequence[Job]) -> None:
    datasets = {job.record: str(job.settings.get("dataset", "digits")) for job in jobs if job.kind == "record"}
    for job in (job for job in jobs if job.kind == "backdoorbench"):
        dataset = datasets.get(job.record, BB_DATASETS[0])  # an existing record: run_defense.py looks into it
        if dataset not in BB_DATASETS:
            raise UserError(
                f"BackdoorBench's {job.settings['defense']} cannot run on {job.record}: it knows no dataset {dataset}, only "
                f"{', '.join(BB_DATASETS)}; choose one of these, or leave BackdoorBench's defenses out."
            )


def _check_distinct(jobs: Sequence[Job]) -> None:
    taken: set[Path] = set()
    for job in jobs:
        if job.folder in taken:
            raise UserError(
                f"Two jobs of the sweep would write {job.folder}; give one of them another name: in the sweep file."
            )
        taken.add(job.folder)


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
        template = flags.pop("name", None)
        used = [name for _, name, _, _ in string.Formatter().parse(template)] if template else []
        if any(name is not None and name not in known for name in used):
            raise UserError(f"records: name {template!r} may only use {', '.join(f'{{{key}}}' for key in known)}.")
        varied = {key: value for key, value in chosen.items() if key not in ("attack", "dataset")}
        name = template.format(**known) if template else f"{known['attack']}_{known['dataset']}{_suffix(varied)}"
        _check_record_flags(name, flags)
        places = {"save_folder_name": name, "record_root": sweep.record_root, "dataset_path": sweep.dataset_path}
        command = [sys.executable, str(PROJECT / "record_scripts" / "make_record.py"), *_flags({**flags, **places})]
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


def _check_record_flags(name: str, flags: Mapping[str, Any]) -> None:
    """Raises UserError: make_record.py knows no such flag, or it cannot have that value."""
    kinds = {key: cls for cls in (Settings, AttackSettings, RecordSettings) for key in fields.fields_of(cls)}
    known = {*fields.fields_of(RecordSettings), *fields.fields_of(AttackSettings), *training_settings()}
    for key, value in flags.items():
        if key not in known - {"save_folder_name", "record_root", "dataset_path", "device"}:
            raise UserError(f"records: {key!r} is not a flag of make_record.py that a sweep can give.")
        if value is not None:
            fields.parse_value(kinds[key], key, value, f"records: {key} of {name}")


def _defense_jobs(sweep: Sweep, record: str, entry: Any, seed: int) -> Iterator[Job]:
    entry = {"defense": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping) or not isinstance(entry.get("defense"), str):
        raise UserError(f"defenses: {entry!r} is neither the name of a defense nor a mapping with the key defense.")
    for flags, chosen in _expand(entry):
        defense = flags.pop("defense")
        method = f"{flags.pop('name', defense)}{_suffix(chosen)}"
        if not re.fullmatch(FOLDER_NAME, method):
            raise UserError(f"defenses: name {method!r} must be letters, digits, '-', '_' or '.'; it names a folder.")
        make = _our_job if defense in OURS else _bb_job
        yield make(sweep, record, defense, method, flags, seed)


def _our_job(sweep: Sweep, record: str, defense: str, method: str, flags: Mapping[str, Any], seed: int) -> Job:
    flags = {"ratio": sweep.ratio, **sweep.ours, **flags, "random_seed": seed}
    flags |= {"selection": OURS[defense]} if defense != "fmp" else {}
    for key in flags:
        if key not in {*FIELDS, "yaml_path"} or key in GIVEN:
            raise UserError(f"defenses: {key!r} is not a setting of {defense} that a sweep can give.")
    settings = load_settings(flags)
    folder = Path(sweep.record_root) / record / "defense" / (method + _seed_suffix(seed))
    places = {"result_file": record, "record_root": sweep.record_root, "dataset_path": sweep.dataset_path}
    places |= {"device": sweep.device} | ({"defense_name": folder.name} if folder.name != "fmp" else {})
    start = [sys.executable]
    if sweep.processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={sweep.processes}"]
    return Job(
        record=record,
        kind="ours",
        method=method,
        seed=seed,
        folder=folder,
        command=(*start, str(PROJECT / "defense" / "fmp.py"), *_flags({**places, **flags})),
        settings={name: getattr(settings, name) for name in deciding_result()},
        shared_work=_shared_work(record, settings),
    )


def _shared_work(record: str, settings: Settings) -> str | None:
    """The longest part of a run that others can read from its cache: the ranking, or the search for triggers.

    Jobs alike in all that decides it have the same text; None where there is no such part, or it must not be shared.
    """
    if settings.fresh or settings.selection not in ("frg", "trigger"):
        return None
    decides = deciding_ranking(settings) if settings.selection == "frg" else deciding_inversion()
    return " ".join([record, settings.selection, *(str(getattr(settings, name)) for name in decides)])


def _bb_job(sweep: Sweep, record: str, defense: str, method: str, flags: Mapping[str, Any], seed: int) -> Job:
    if sweep.backdoorbench is None:
        raise UserError(
            f"defenses: {defense} is none of ours ({', '.join(OURS)}), so it is BackdoorBench's; "
            "the sweep needs the key backdoorbench: the folder of a checkout."
        )
    script = Path(sweep.backdoorbench) / "defense" / f"{defense}.py"
    if not script.is_file():
        raise UserError(f"defenses: there is no {script}; check backdoorbench and the name.")
    results = Path(sweep.record_root) / record / "defense"
    takes_ratio = re.search(r"""['"]--ratio['"]""", script.read_text(encoding="utf-8", errors="replace"))
    common = {"ratio": sweep.ratio} if takes_ratio and sweep.ratio is not None else {}
    flags = {**common, **flags, "random_seed": seed}
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
    return [word for key, value in given.items() for word in (f"--{key}", fields.as_text(value))]
