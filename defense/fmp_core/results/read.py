"""Reading one record's figures and one defense's result, ours or BackdoorBench's, whatever files each defense writes.

Folders may come from anywhere: what cannot be read raises a UserError that names the file on one line.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fmp_core.data.names import BB_DATASETS, DEFENSE_FILE
from fmp_core.errors import UserError
from fmp_core.metrics import METRICS, MetricValues
from fmp_core.results.bb_files import fractions, logged_settings, logs_until, read_summary, seconds_of_bb, summary_file
from fmp_core.results.detection import Detection, detection_of_neural_cleanse, detection_of_verdict
from fmp_core.results.values import finite_number, read_json, value_of, whole_number
from fmp_core.settings import deciding_result
from fmp_core.storage.files import file_digest

STAMP = "sweep.json"  # written by sweeps into each result folder: what was run, with which settings
SWEEP_MARK = "FMP_SWEEP"  # environment variable of every process a sweep starts: the sweep's folder
WHOLE_TEST = "whole_test.json"  # of a BB defense that tested on few images while it ran (run_defense.py --test_images)
SAMPLE_ONLY = "test_images"  # key of a run that has not come to that test
MODEL_DIGEST = "defense_result"  # key of the SHA-256 of the defense_result.pt that was tested
RUN_NOTE = "run_defense.json"  # of a BB defense: which attack_result.pt it defended, and which defense_result.pt came of it
ATTACK_DIGEST = "attack_result"  # key of the SHA-256 of the record's attack_result.pt
RUN_DTYPE = "dtype"  # key of the precision that the defense ran in, where torch's autocast lowers it
WHOLE_RUN = {RUN_DTYPE: "fp32", SAMPLE_ONLY: "all"}  # of a BB defense that neither flag of run_defense.py changed
ATTACK_NAMES = {"lowfrequency": "lf", "label_consistent": "lc"}  # info.pickle's names -> those of files and leaderboard
ATTACKS = "badnet|blended|blind|bpp|ctrl|inputaware|lc|lf|lira|refool|sig|ssba|trojannn|wanet"
DATASETS = "|".join(sorted((*BB_DATASETS, "digits"), key=len, reverse=True))
# Of make_record.py and of BB.
TRIGGER_FILES = re.compile(r"trigger_file|trigger_img_path|mask_path|pattern_?path|replace_imgs_path", re.IGNORECASE)
# BB's defenses of which defense_result.pt is not what they test: npd saves the attacked weights, nab tests images with a
# stamp, mcr may save the weights of another epoch or place on its curve, dbd a model with a head of its own.
NO_FINAL_TEST = {"npd", "nab", "mcr", "dbd"}
DECIDE_BY_TESTS = {"finetune_df_summary.csv", "anp_df_summary.csv"}  # of fp and anp: the tests say how much they prune
APART = ("random_seed", "test_images")  # settings of ours that tables keep apart by themselves
UNUSED_RATIO = ("d-br", "d-st")  # their settings have a ratio that the scripts never read
NOT_DECIDING = (
    r"(?<!trigger_)seed|(?<!layer_)(?<!param_)name|path|folder|root|save|log|file|device|worker|terminal|time|frequency|memory|"
    r"blocking|prefetch|fresh|quiet"
)
OTHER_MODELS = {"load_other_model_path", "checkpoint_path"}  # of mcr and ft-sam: they do, where they are given
# Neither do those that BB's logs tell of the attacked model.
NOT_OF_DEFENSE = rf"{NOT_DECIDING}|^(attack|dataset|model$|num_classes|input_|img_size|pratio|result)"


@dataclass(frozen=True)
class Result:
    """What one defense left of a model (``metrics``: METRICS as fractions in [0,1]), and what is known about the run.

    ASR and RA are None where our run had no triggered image.
    """

    metrics: MetricValues
    source: str  # the file the numbers were read from
    ours: bool = False
    stamped: bool = False  # a sweep made it, and nothing has written there since
    seed: int | None = None
    method: str | None = None  # the sweep's label, equal over seeds
    settings: Mapping[str, Any] = field(default_factory=dict)  # as far as they are known; those of BackdoorBench are text
    settings_digest: str | None = None  # differs between results of other settings than the seed
    code: str | None = None  # the commit of this project that ran
    before: MetricValues = field(default_factory=dict)  # the attacked model, as this run tested it
    dataset: str | None = None
    model: str | None = None
    ratio: float | None = None  # share of the clean training set it was given
    test_images: int | None = None  # tested on a sample of so many images only
    seconds: float | None = None  # elapsed
    cpu_seconds: float | None = None  # of all its processes and threads
    reused: str | None = None  # stages that these seconds do not, or not wholly, contain
    detection: Detection | None = None  # what it says about the attacked model
    attack_result: str | None = None  # SHA-256 of the attacked model's file, where the run noted it


def read_result(folder: Path) -> Result:
    """The result in ``record/<name>/defense/<defense>``. Raises UserError: there is none, or it is damaged or impossible."""
    path = folder / "metrics.json"
    return _our_result(path) if path.is_file() else _bb_result(folder)


def _bb_result(folder: Path) -> Result:
    tested = _whole_test(folder)
    if (folder / "fmp_df_summary.csv").is_file():
        raise UserError(f"{folder} has no metrics.json, though FMP wrote there; the run did not end, run it again")
    path = summary_file(folder) if tested is None else folder / WHOLE_TEST
    metrics = read_summary(path) if tested is None else fractions(tested, path)
    stamp, logs = _own_stamp(folder, path), logs_until(folder, path.stat().st_mtime)
    logged = logged_settings(logs)
    settings = logged or {key: str(value) for key, value in (value_of(stamp, "settings", dict) or {}).items()}
    note = _note_of_run(folder)
    # Another model than the noted one is of a run after that of run_defense.log.
    seconds, cpu = seconds_of_bb(folder) if note or not (folder / DEFENSE_FILE).is_file() else (None, None)
    by_run = {RUN_DTYPE: str(note.get(RUN_DTYPE, "fp32")), SAMPLE_ONLY: "all"}
    if tested and {path.name for path in folder.glob("*_df_summary.csv")} & DECIDE_BY_TESTS:
        by_run[SAMPLE_ONLY] = str(note.get(SAMPLE_ONLY) or "few")
    deciding = {key: value for key, value in settings.items() if not re.search(NOT_OF_DEFENSE, key)}
    others = {key: value for key, value in settings.items() if key in OTHER_MODELS and value != "None"}
    deciding |= {key: value.rpartition("defense/")[2] for key, value in others.items()}  # on whatever record
    deciding |= {key: value for key, value in by_run.items() if value != WHOLE_RUN[key]}
    no_share = logged.get("index", "None") != "None" or any((folder / f"{x}_df_summary.csv").is_file() for x in UNUSED_RATIO)
    return Result(
        metrics,
        str(path),
        stamped=bool(stamp),
        seed=whole_number({"seed": int(logged["random_seed"]) if logged else None, **stamp}, "seed"),
        method=value_of(stamp, "method", str),
        settings={**settings, **by_run},
        settings_digest=_digest(deciding),
        ratio=None if no_share else finite_number(settings.get("ratio")),
        seconds=seconds,
        cpu_seconds=cpu,
        detection=detection_of_neural_cleanse(logs) if (folder / "nc_df_summary.csv").is_file() else None,
        attack_result=value_of(note, ATTACK_DIGEST, str),
    )


def _our_result(path: Path) -> Result:
    content, stamp = read_json(path), _own_stamp(path.parent, path)
    settings, before, after = (value_of(content, key, dict) or {} for key in ("settings", "before", "after"))
    if not after:
        raise UserError(f"{path} has no metrics after the defense")
    return Result(
        _our_fractions(after, path),
        str(path),
        ours=True,
        stamped=bool(stamp),
        seed=whole_number({**content, **stamp}, "seed"),
        method=value_of(stamp, "method", str),
        settings=settings,
        settings_digest=_digest({key: settings.get(key) for key in deciding_result() if settings and key not in APART}),
        code=value_of(value_of(content, "versions", dict) or {}, "git", str),
        before=_our_fractions(before, path) if before else {},
        dataset=value_of(content, "dataset", str),
        model=value_of(content, "model", str),
        ratio=None if settings.get("index") else finite_number(settings.get("ratio")),
        test_images=whole_number(content if "test_images" in content else settings, "test_images"),
        seconds=sum(filter(None, map(finite_number, (value_of(content, "seconds", dict) or {}).values()))) or None,
        cpu_seconds=finite_number(content.get("cpu_seconds")),
        reused=", ".join(map(str, value_of(content, "reused", list) or [])) or None,
        detection=detection_of_verdict(value_of(content, "verdict", dict) or {}),
        attack_result=value_of(content, "attack_result", str),
    )


def read_stamp(folder: Path) -> dict[str, Any]:
    """What a sweep noted beside a result or record; empty if there is no such file or it is unreadable."""
    try:
        return read_json(folder / STAMP)
    except UserError:
        return {}


def _own_stamp(folder: Path, source: Path) -> dict[str, Any]:
    """What a sweep noted beside the result in ``source``; nothing if something else wrote that file since."""
    stamp = read_stamp(folder)
    return stamp if stamp and stamp.get("source") == file_digest(source) else {}


def _whole_test(folder: Path) -> dict[str, Any] | None:
    """The test on all images, if there is one of the model in ``folder``: BB's script, run directly, replaces that alone.

    Raises UserError: there is to be one, but the run did not end.
    """
    path = folder / WHOLE_TEST
    content = read_json(path) if path.is_file() else None
    if content and SAMPLE_ONLY in content:
        raise UserError(f"{folder} is of a run with --test_images {content[SAMPLE_ONLY]} that did not end; run it again")
    if content and content.get(MODEL_DIGEST) and not _is_of_model(content, folder):
        return None
    return content


def read_attack_metrics(folder: Path) -> dict[str, float]:
    """Acc, ASR and RA of the attacked model as the attack logged them, or nothing. Raises UserError: the file is damaged."""
    path = folder / "attack_df_summary.csv"
    return read_summary(path) if path.is_file() else {}


def read_record(folder: Path) -> dict[str, Any]:
    """What ``info.pickle`` says about the attack, or else what the folder's name says in BB's habit (``badnet_cifar10...``).

    Keys ``dataset``, ``model``, ``attack``, ``target`` (a class, or ``all-to-all``), ``pratio``, ``record_seed``, and
    ``record_digest``: it differs between records whose attack or training had other settings. Raises UserError: info.pickle
    is damaged or refused.
    """
    guess = re.match(rf"({ATTACKS})_({DATASETS})(?![a-z0-9])", folder.name)
    attack, dataset = guess.groups() if guess else (None, None)
    path, info = folder / "info.pickle", {}
    if path.is_file():
        from fmp_core.storage.torch_file import load_torch_file  # imports torch, which takes seconds

        info = load_torch_file(path)
        if not isinstance(info, Mapping):
            raise UserError(f"{path} does not hold the attack's settings")
    name = (value_of(info, "attack", str) or "").lower()
    return {
        "dataset": value_of(info, "dataset", str) or dataset,
        "model": value_of(info, "model", str),
        "attack": ATTACK_NAMES.get(name, name) or attack,
        "target": _target(info),
        "pratio": finite_number(info.get("pratio")),
        "record_seed": whole_number(info, "random_seed"),
        "record_digest": _digest({str(key): _comparable(key, value) for key, value in info.items() if _decides(key, value)}),
    }


def _target(info: Mapping[str, Any]) -> str | None:
    if value_of(info, "attack_label_trans", str) == "all2all":
        return "all-to-all"
    target = whole_number(info, "attack_target")
    return None if target is None else str(target)


def _digest(settings: Mapping[str, Any]) -> str | None:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8] if settings else None


def _decides(key: object, value: object) -> bool:
    """Whether an entry of info.pickle tells what was attacked and how: no seed, device or place on a machine."""
    known = TRIGGER_FILES.search(str(key)) or not re.search(NOT_DECIDING, str(key))
    plain = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(part, (bool, int, float, str)) for part in plain) and bool(known)


def _comparable(key: object, value: object) -> object:
    """A file without the folder it lay in."""
    return Path(value).name if isinstance(value, str) and TRIGGER_FILES.search(str(key)) else value


def _our_fractions(values: Mapping[str, Any], path: Path) -> MetricValues:
    """Those of metrics.json, where ASR and RA are null if there was no triggered image."""
    untested = [name for name in METRICS[1:] if name in values and values[name] is None]
    if len(untested) < len(METRICS) - 1:
        return fractions(values, path)
    return {**fractions({**values, **dict.fromkeys(untested, 0)}, path), **dict.fromkeys(untested)}


def _note_of_run(folder: Path) -> dict[str, Any]:
    """What ``run_defense.py`` noted; empty if it did not run, or BB's script was run without it since."""
    note = folder / RUN_NOTE
    content = read_json(note) if note.is_file() else {}
    return content if content and _is_of_model(content, folder) else {}


def _is_of_model(noted: Mapping[str, Any], folder: Path) -> bool:
    """Whether what was ``noted`` is about the model in ``folder``; without a model, as copied tables are, it is."""
    model = folder / DEFENSE_FILE
    return not model.is_file() or noted.get(MODEL_DIGEST) == file_digest(model)
