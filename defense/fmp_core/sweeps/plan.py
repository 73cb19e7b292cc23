"""A sweep file -> the jobs it asks for: records to make, then defenses x settings x seeds on each of them."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fmp_core import PROJECT, fields
from fmp_core.attacks.settings import AttackSettings, RecordSettings
from fmp_core.data.names import BB_DATASETS
from fmp_core.errors import UserError
from fmp_core.fields import ANYTHING, DEVICE, REQUIRED, choice, integer, list_of, mapping, number, pattern, setting, text
from fmp_core.results.read import NO_FINAL_TEST
from fmp_core.settings import (
    FIELDS,
    Settings,
    Stage,
    deciding_inversion,
    deciding_ranking,
    deciding_result,
    load_settings,
    names,
    training_settings,
)
from fmp_core.storage.files import file_digest
from fmp_core.sweeps.jobs import Job

OURS = {"fmp": "frg", "ft-only": "none", "random-prune": "random"}  # name in a sweep -> --selection
GIVEN = {*names(Stage.NAMING, Stage.NO_EFFECT, decides=False), "device"}  # settings that the sweep itself gives, or nobody


@dataclass(frozen=True)
class Slurm:
    """What a sweep file may ask of Slurm. The tag ``submitit`` is submitit's name of a field."""

    partition: str | None = setting(None, text("NAME"), "partition", submitit="slurm_partition")
    time: int | None = setting(None, integer(1), "minutes a job may take", submitit="timeout_min")
    gpus: int | None = setting(None, integer(0), "GPUs of a job", submitit="gpus_per_node")
    cpus: int | None = setting(None, integer(1), "CPUs of a job", submitit="cpus_per_task")
    memory_gb: float | None = setting(None, number(0, above=True), "memory of a job", submitit="mem_gb")
    account: str | None = setting(None, text("NAME"), "account", submitit="slurm_account")
    qos: str | None = setting(None, text("NAME"), "quality of service", submitit="slurm_qos")
    constraint: str | None = setting(None, text("NAME"), "features of a node", submitit="slurm_constraint")
    setup: Sequence[str] | None = setting(
        None, list_of(text("LINE"), "a list of shell lines"), "run before a job", submitit="slurm_setup"
    )
    at_once: int | None = setting(None, integer(1), "jobs at the same time", submitit="slurm_array_parallelism")


@dataclass(frozen=True)
class Sweep:
    """A sweep file. Every field is a key of it; see docs/sweeps.md."""

    name: str = setting(
        REQUIRED, pattern(r"\w[\w.-]*", "letters, digits, '-', '_' or '.'; it names a folder"), "the folder below sweeps/"
    )
    records: Sequence[Any] = setting(REQUIRED, list_of(ANYTHING), "names of records, or flags of make_record.py")
    defenses: Sequence[Any] = setting(REQUIRED, list_of(ANYTHING), "names of defenses, or a name and settings")
    seeds: Sequence[int] = setting((0,), list_of(integer(0), "a list of whole numbers of at least 0"), "random_seed")
    ratio: float | None = setting(None, number(0, 1, above=True), "share of clean data, ours and BackdoorBench's")
    record_root: str = setting("./record", text("FOLDER"), "the folder of attack records")
    dataset_path: str = setting("./data", text("FOLDER"), "the folder of datasets")
    device: str = setting("auto", DEVICE, "cpu, cuda, or the GPUs to use: cuda:0,1; a job gets one")
    workers: int = setting(1, integer(1), "jobs at a time on each GPU, or on the CPU")
    processes: int = setting(1, integer(1), "processes of each of our runs, under torchrun")
    timeout: float | None = setting(None, number(0, above=True), "minutes after which a job counts as failed")
    ours: Mapping[str, Any] = setting(dict, mapping(), "settings of all of our defenses")
    backdoorbench: str | None = setting(None, text("FOLDER"), "root of a checkout; runs BackdoorBench's defenses")
    backdoorbench_test_images: int | None = setting(None, integer(1), "run_defense.py --test_images of its defenses")
    backdoorbench_dtype: str = setting("fp32", choice("fp32", "bf16"), "run_defense.py --dtype of its defenses")
    slurm: Mapping[str, Any] = setting(dict, mapping(*fields.fields_of(Slurm)), "what sbatch is asked for")

    @property
    def folder(self) -> Path:
        """Logs and locks of the sweep."""
        return Path("sweeps") / self.name

    @property
    def job_device(self) -> str:
        """``device`` as a job says it, which sees only the GPUs that are its own."""
        return "cuda" if self.device.startswith("cuda") else self.device

    @property
    def seconds(self) -> float | None:
        """``timeout`` in seconds."""
        return None if self.timeout is None else 60 * self.timeout


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file. Raises UserError: not readable, an unknown key or an impossible value."""
    content = fields.read_yaml_mapping(path, "Sweep file")
    return make_sweep({"name": path.stem, **content}, f"Sweep file {path}")


def make_sweep(content: Mapping[str, Any], source: str) -> Sweep:
    """A Sweep from the mapping a sweep file holds. Raises UserError, beginning with ``source``."""
    sweep = Sweep(**fields.parse_mapping(Sweep, content, source))
    if sweep.ratio is not None and "ratio" in sweep.ours:
        raise UserError(f"{source}: ratio is said twice, for all defenses and in ours; leave one out.")
    if twice := [seed for place, seed in enumerate(sweep.seeds) if seed in sweep.seeds[:place]]:
        raise UserError(f"{source}: seeds has {twice[0]} twice; leave one out.")
    return replace(sweep, slurm=fields.parse_mapping(Slurm, sweep.slurm, f"{source}: slurm"))


def plan(sweep: Sweep) -> list[Job]:
    """All jobs of a sweep, records first. Raises UserError: a setting is unknown or impossible, two jobs would write the same
    folder, or BackdoorBench's defenses are asked to run on a dataset that it does not know."""
    datasets: dict[str, str] = {}  # of each record; that of an existing one run_defense.py looks up
    jobs: dict[str, Job] = {}  # by the folder they write, which several names may lead to
    for job in _all_jobs(sweep, datasets):
        dataset = datasets[job.record]
        if job.kind == "backdoorbench" and dataset not in BB_DATASETS:
            raise UserError(
                f"BackdoorBench's {job.settings['defense']} cannot run on {job.record}: it knows no dataset {dataset}, only "
                f"{', '.join(BB_DATASETS)}; choose one of these, or leave BackdoorBench's defenses out."
            )
        folder = os.path.realpath(job.folder)
        if folder in jobs:
            raise UserError(
                f"Two jobs of the sweep would write {job.folder}; give one of them another name: in the sweep file."
            )
        jobs[folder] = job
    return list(jobs.values())


def _all_jobs(sweep: Sweep, datasets: dict[str, str]) -> Iterator[Job]:
    for entry in sweep.records:
        if isinstance(entry, str):
            datasets[entry] = BB_DATASETS[0]
            continue
        if not isinstance(entry, Mapping):
            raise UserError(f"records: {entry!r} is neither the name of a record nor flags of make_record.py.")
        for flags, chosen in _expand(entry):
            job = _record_job(sweep, flags, chosen)
            datasets[job.record] = str(job.settings.get("dataset", "digits"))
            yield job
    for record, entry, seed in itertools.product(datasets, sweep.defenses, sweep.seeds):
        entry = {"defense": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping) or not isinstance(entry.get("defense"), str):
            raise UserError(f"defenses: {entry!r} is neither the name of a defense nor a mapping with the key defense.")
        for flags, chosen in _expand(entry):
            defense = flags.pop("defense")
            method = f"{flags.pop('name', None) or defense}{_suffix(chosen)}"
            if "random_seed" in flags or (defense in OURS and "random_seed" in sweep.ours):
                raise UserError("defenses and ours: random_seed is what the key seeds of the sweep gives; say it there.")
            make = _our_job if defense in OURS else _bb_job
            yield make(sweep, record, defense, method, {**flags, "random_seed": seed})


def _expand(entry: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every combination of the keys that hold a list, with the part of it that varies.

    The list of a setting that takes several numbers (``mean: [0.5, 0.4, 0.3]``) is one value; lists in a list are several.
    """

    def is_one_value(key: str, value: list[Any]) -> bool:
        several = key in FIELDS and FIELDS[key].metadata["kind"].several
        return several and bool(value) and not any(isinstance(part, (list, str)) for part in value)

    varied = {key: value for key, value in entry.items() if isinstance(value, list) and not is_one_value(key, value)}
    if empty := [key for key, value in varied.items() if not value]:
        raise UserError(f"{empty[0]} is an empty list, with which nothing would run; give it values, or leave it out.")
    for values in itertools.product(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        yield {**entry, **chosen}, chosen


def _suffix(chosen: Mapping[str, Any]) -> str:
    return "".join(f"-{key}{re.sub(r'[^0-9A-Za-z.]', '_', str(value))}" for key, value in chosen.items())


def _record_job(sweep: Sweep, flags: dict[str, Any], chosen: Mapping[str, Any]) -> Job:
    known = {"attack": "badnet", "dataset": "digits", **flags}
    varied = {key: value for key, value in chosen.items() if key not in ("attack", "dataset")}
    template = flags.pop("name", None) or f"{{attack}}_{{dataset}}{_suffix(varied)}"
    try:
        if any(name is not None and name not in known for _, name, _, _ in string.Formatter().parse(template)):
            raise KeyError
        name = str(template).format(**known)
    except (KeyError, ValueError, TypeError, AttributeError):
        usable = ", ".join(f"{{{key}}}" for key in known)
        raise UserError(f"records: name {template!r} must be a text, which may use {usable}.") from None
    if Path(str(known["dataset"])).name != known["dataset"]:
        raise UserError(
            f"records: dataset {known['dataset']!r} must be a name; the folder it is in is the sweep's dataset_path."
        )
    fields.parse_value(RecordSettings, "save_folder_name", name, "records: name")
    if known["attack"] == "none":
        raise UserError(
            "records: attack none makes no poisoned test images, which defenses need; a clean control has pratio: 0."
        )
    kinds = {key: cls for cls in (Settings, AttackSettings, RecordSettings) for key in fields.fields_of(cls)}
    given = {*fields.fields_of(RecordSettings), *fields.fields_of(AttackSettings), *training_settings()}
    for key, value in flags.items():
        if key not in given - {"save_folder_name", "record_root", "dataset_path", "device"}:
            raise UserError(f"records: {key!r} is not a flag of make_record.py that a sweep can give.")
        if value is not None:
            fields.parse_value(kinds[key], key, value, f"records: {key} of {name}")
    places = {"save_folder_name": name, "record_root": sweep.record_root, "dataset_path": sweep.dataset_path}
    words = _flags({**flags, **places, "device": sweep.job_device})
    command = (sys.executable, str(PROJECT / "record_scripts" / "make_record.py"), *words)
    return Job(name, "record", "record", None, Path(sweep.record_root) / name, command, flags)


def _our_job(sweep: Sweep, record: str, defense: str, method: str, flags: Mapping[str, Any]) -> Job:
    if defense != "fmp" and "selection" in {**sweep.ours, **flags}:
        raise UserError(f"defenses: {defense} has a selection of its own; leave selection out, or put it into an entry of fmp.")
    flags = {"ratio": sweep.ratio, **sweep.ours, **flags} | ({"selection": OURS[defense]} if defense != "fmp" else {})
    for key in flags:
        if key not in {*FIELDS, "yaml_path"} or key in GIVEN:
            raise UserError(f"defenses: {key!r} is not a setting of {defense} that a sweep can give.")
    settings = load_settings(flags)
    folder = _result_folder(sweep, record, method, settings.random_seed)
    places = {"result_file": record, "record_root": sweep.record_root, "dataset_path": sweep.dataset_path}
    places |= {"device": sweep.job_device} | ({"defense_name": folder.name} if folder.name != "fmp" else {})
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={sweep.processes}", "--")  # else it reads --p
    start = (sys.executable, *(torchrun if sweep.processes > 1 else ()), str(PROJECT / "defense" / "fmp.py"))
    command = (*start, *_flags({**places, **flags}))
    decides = {name: getattr(settings, name) for name in deciding_result()}
    return Job(record, "ours", method, settings.random_seed, folder, command, decides, _shared_work(record, settings))


def _shared_work(record: str, settings: Settings) -> str | None:
    """The longest part of a run that others can read from its cache: the ranking, or the search for triggers.

    Jobs alike in all that decides it have the same text; None where there is no such part, or it must not be shared.
    """
    if settings.fresh or settings.selection not in ("frg", "trigger"):
        return None
    decides = deciding_ranking(settings) if settings.selection == "frg" else deciding_inversion()
    return " ".join([record, settings.selection, *(str(getattr(settings, name)) for name in decides)])


def _bb_job(sweep: Sweep, record: str, defense: str, method: str, flags: Mapping[str, Any]) -> Job:
    if sweep.backdoorbench is None:
        raise UserError(
            f"defenses: {defense} is none of ours ({', '.join(OURS)}), so it is BackdoorBench's; "
            "the sweep needs the key backdoorbench: the folder of a checkout."
        )
    script = Path(sweep.backdoorbench) / "defense" / f"{defense}.py"
    if not script.is_file():
        raise UserError(f"defenses: there is no {script}; check backdoorbench and the name.")
    takes_ratio = re.search(r"""['"]--ratio['"]""", script.read_text(encoding="utf-8", errors="replace"))
    flags = {**({"ratio": sweep.ratio} if takes_ratio and sweep.ratio is not None else {}), **flags}
    about = {"backdoorbench": sweep.backdoorbench, "defense": defense, "result_file": record}
    about |= {"record_root": sweep.record_root, "dataset_path": sweep.dataset_path, "device": sweep.job_device}
    sample = sweep.backdoorbench_test_images if defense not in NO_FINAL_TEST else None
    quicker: dict[str, Any] = {"test_images": sample} if sample else {}
    quicker |= {"dtype": sweep.backdoorbench_dtype} if sweep.backdoorbench_dtype != "fp32" else {}
    start = (sys.executable, str(PROJECT / "record_scripts" / "run_defense.py"))
    folder = _result_folder(sweep, record, method, flags["random_seed"])
    command = (*start, *_flags({**about, **quicker}), "--", *_flags(flags))
    decides = {"defense": defense, **flags, **quicker, "code": _digest_of_defense(script)}
    writes = folder.with_name(defense)
    return Job(record, "backdoorbench", method, flags["random_seed"], folder, command, decides, writes=writes)


def _digest_of_defense(script: Path) -> str:
    """Of a defense of BackdoorBench and its own settings files, in which checkouts may differ."""
    files = [script, *sorted((script.parents[1] / "config" / "defense" / script.stem).glob("*.y*ml"))]
    return hashlib.sha256("".join(file_digest(file) for file in files).encode()).hexdigest()[:16]


def _result_folder(sweep: Sweep, record: str, method: str, seed: int) -> Path:
    name = fields.parse_value(Settings, "defense_name", method + (f"-s{seed}" if seed else ""), "defenses: name")
    return Path(sweep.record_root) / record / "defense" / name


def _flags(values: Mapping[str, Any]) -> list[str]:
    given = {key: value for key, value in values.items() if value is not None}
    return [word for key, value in given.items() for word in (f"--{key}", fields.as_text(value))]
