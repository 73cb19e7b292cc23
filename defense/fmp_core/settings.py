"""The settings of a run of ``fmp.py``: dataclass defaults < YAML file < preset < command-line flags."""

from __future__ import annotations

import argparse
import dataclasses
import enum
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fmp_core import PROJECT, fields
from fmp_core.errors import UserError, did_you_mean, what_is_there
from fmp_core.fields import BOOLEAN, DEVICE, NAME, choice, integer, number, numbers, or_word, setting, text

DEFAULT_YAML = "./config/defense/fmp/config.yaml"


class Stage(enum.Enum):
    """What a setting touches, in the order of a run. The first stage of a setting is its group in ``--help``."""

    NAMING = "the record and the folders"
    RUN = "the run"
    LOADING = "data and attacked model"
    RANKING = "ranking feature maps (FRG)"
    INVERSION = "trigger inversion"
    CHOOSING = "choosing the feature maps to prune"
    FINE_TUNING = "fine-tuning"
    TRAINING = "training of the attacked model"  # by make_record.py, which borrows these settings
    TESTING = "testing"
    OUTPUT = "output"
    NO_EFFECT = "flags of BackdoorBench without effect"


def _tagged(*stages: Stage, decides: bool = True, **fixed: Any) -> Callable[..., Any]:
    """Declares fields with their tag: the stages they touch, and ``decides``: whether results depend on their values."""
    return partial(setting, stages=stages, decides=decides, **fixed)


_place = _tagged(Stage.NAMING, decides=False)
_run = _tagged(Stage.RUN, decides=False)
_device = _tagged(Stage.RUN, Stage.TRAINING, decides=False)
_loading = _tagged(Stage.LOADING)
_seeded = _tagged(Stage.LOADING, Stage.RANKING, Stage.INVERSION, Stage.FINE_TUNING, Stage.TRAINING)
_ranking = _tagged(Stage.RANKING)
_rank_or_invert = _tagged(Stage.RANKING, Stage.INVERSION)
_choosing = _tagged(Stage.CHOOSING)
_tuning = _tagged(Stage.FINE_TUNING)
_training = _tagged(Stage.FINE_TUNING, Stage.TRAINING)
_batch = _tagged(Stage.FINE_TUNING, Stage.TRAINING, Stage.TESTING)
_testing = _tagged(Stage.TESTING)
_output = _tagged(Stage.OUTPUT, decides=False)
_no_effect = _tagged(Stage.NO_EFFECT, help="no effect; accepted because BackdoorBench has it", decides=False)

_FOLDER = text("FOLDER")
_STATISTIC = "one or three numbers{}, for pixels in [0,1], such as 0.5 or 0.49,0.48,0.45"
_CHECKED = "checked against the record"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting of a run. A field is a flag (``--name``) and a YAML key of the same name.

    Names are BackdoorBench's wherever BB has the flag (``defense/ft.py``, ``defense/fp.py``). What each setting touches is
    said here alone: :func:`names` and the functions after it derive from it what a cache, a sweep or a checkpoint depends on.
    """

    result_file: str | None = _place(None, text("RECORD"), "the attack record: a folder name below --record_root")
    record_root: str = _place("./record", _FOLDER, "the folder of attack records")
    dataset_path: str = _place("./data", _FOLDER, "the folder of datasets; the dataset's name is appended")
    save_folder: str | None = _place(
        None, _FOLDER, "results go to FOLDER/<record>/defense/, not into the record (which may be read-only)"
    )
    defense_name: str = _place("fmp", NAME, "the result folder's name, in <record>/defense/ (see --save_folder)")
    log: str | None = _place(None, _FOLDER, "folder of the log (default: log/ in the result folder)")
    checkpoint_save: str | None = _place(None, _FOLDER, "saved epochs, below <record>/<defense_name> (default: in the results)")

    # Does not decide: what it sets, does.
    preset: str = _run(
        "paper",
        choice("paper", "strong"),
        "paper: as published; strong: our extension (docs/method.md); flags override what it sets",
    )
    device: str = _device("auto", DEVICE, "auto (CUDA where there is one), cpu, cuda, cuda:0 or cuda:0,1")
    fresh: bool = _run(False, BOOLEAN, "use neither cached scores nor the state of an interrupted run")
    wait: bool = _run(False, BOOLEAN, "wait while another run works in the same result folder, instead of ending")

    dataset: str | None = _loading(None, text("NAME"), _CHECKED, decides=False)
    model: str | None = _loading(None, text("NAME"), _CHECKED, decides=False)
    num_classes: int | None = _loading(None, integer(2), _CHECKED, decides=False)
    mean: tuple[float, ...] | None = _loading(
        None,
        numbers(number(0, 1), _STATISTIC.format(""), "MEAN", lengths=(1, 3)),
        "mean that the model's preprocessing subtracts; goes with --std (default: the dataset's)",
    )
    std: tuple[float, ...] | None = _loading(
        None,
        numbers(number(0, above=True), _STATISTIC.format(" above 0"), "STD", lengths=(1, 3)),
        "standard deviation that the model's preprocessing divides by; goes with --mean (default: the dataset's)",
    )
    ratio: float = _loading(0.1, number(0, 1, above=True), "share of the clean training set the defender owns")
    index: str | None = _loading(
        None,
        text("FILE"),
        "text file of clean-training-set indices to use instead of --ratio; if class by class, the seed mixes them",
    )
    random_seed: int = _seeded(0, integer(0, 2**32 - 1, "SEED"), "seed of clean subset, FRG, inversion and fine-tuning")

    eps: float = _ranking(1 / 255, number(0, 1, above=True), "perturbation bound in pixel space [0,1]", shown="1/255")
    frg_steps: int = _ranking(1, integer(1), "gradient steps; 1 is Algorithm 1 of the paper")
    alpha: float | None = _ranking(None, number(0, 1, above=True), "step size if there are several (default 2.5*eps/frg_steps)")
    frg_samples: int | str = _ranking(32, or_word(integer(1), "all"), "clean images each feature map is scored on")
    ranking: str = _ranking(
        "exact",
        choice("exact", "racing"),
        "exact: score every feature map on every image; racing: drop early those that will not be pruned",
    )
    dtype: str = _rank_or_invert(
        "fp32",
        choice("fp32", "bf16", "auto"),
        "precision of ranking and trigger inversion; auto: bf16 where the hardware has it",
    )
    chunk: int | str = _ranking("auto", or_word(integer(1), "auto"), "images per batch of ranking", decides=False)
    memory: int | None = _ranking(None, integer(64, None, "MIB"), "MiB that ranking may keep; lowers the chunk", decides=False)

    selection: str = _choosing(
        "frg",
        choice("frg", "trigger", "random", "none"),
        "frg: lowest FRG scores; trigger: largest activation change by an inverted trigger; random, none: ablations",
    )
    p: int = _choosing(64, integer(1, metavar="P"), "the N/p lowest-scored of N feature maps are pruned")
    scope: str = _choosing("layer", choice("layer", "global"), "layer: N/p of each layer; global: N/p of all layers together")
    budget: float = _choosing(
        0.05, number(0, 1, metavar="SHARE"), "with --selection trigger: accuracy on clean images that pruning may cost"
    )

    masked: bool = _tuning(False, BOOLEAN, "keep pruned feature maps at zero while fine-tuning")
    unlearn: float = _tuning(
        0.0, number(0, 1, metavar="SHARE"), "with --selection trigger: share of images that carry inverted triggers"
    )
    distill: float = _tuning(
        0.0, number(0, metavar="WEIGHT"), "weight of the distillation loss towards the attacked model's outputs"
    )
    interpolate: float = _tuning(
        0.0,
        number(0, 1, metavar="SHARE"),
        "share of the attacked model's weights when they are averaged with the fine-tuned ones",
    )
    epochs: int = _training(10, integer(0), "fine-tuning epochs; 0 prunes and evaluates only")
    batch_size: int = _batch(256, integer(2), "batch size of fine-tuning, and of the mean loss of tests")
    lr: float = _training(0.01, number(0, 1e30, above=True), "learning rate")
    lr_scheduler: str = _training(
        "CosineAnnealingLR",
        choice("CosineAnnealingLR", "StepLR", "MultiStepLR", "ReduceLROnPlateau"),
        "learning-rate schedule, per epoch",
    )
    steplr_stepsize: int = _training(5, integer(1), "StepLR: epochs between steps")
    steplr_gamma: float = _training(0.1, number(0, 10, above=True, metavar="FACTOR"), "StepLR, MultiStepLR: factor of a step")
    steplr_milestones: tuple[int, ...] = _training(
        (5, 8), numbers(integer(1), "epochs separated by commas, such as 5,8", "N,N"), "MultiStepLR: epochs of the steps"
    )
    sgd_momentum: float = _training(0.9, number(0, 1), "momentum of SGD")
    wd: float = _training(5e-4, number(0, 1e30), "weight decay of SGD")
    amp: bool = _training(True, BOOLEAN, "train under bfloat16 autocast where the device has it in hardware")
    client_optimizer: str = _tuning("sgd", choice("sgd"), "optimizer of fine-tuning")

    test_images: int | None = _testing(None, integer(1), "test on an even sample of N images of each test set (default: all)")
    frequency_test: int = _testing(1, integer(0), "test every N-th epoch; 0 tests before and after only")

    report: bool = _output(True, BOOLEAN, "write report.html beside the results")
    tensorboard: bool = _output(False, BOOLEAN, "also write TensorBoard event files into tensorboard/")
    frequency_save: int = _output(0, integer(0), "save the model every N-th epoch into checkpoint/; 0 never")
    quiet: bool = _output(False, BOOLEAN, "print warnings and errors only; the log file stays complete")
    log_level: str = _output("info", choice("debug", "info", "warning"), "what is printed while the program runs")

    num_workers: float = _no_effect(0, number(0, metavar="N"))
    pin_memory: bool = _no_effect(True, BOOLEAN, short="-pm")
    non_blocking: bool = _no_effect(True, BOOLEAN, short="-nb")
    prefetch: bool = _no_effect(False, BOOLEAN, short="-pf")
    checkpoint_load: str | None = _no_effect(None, text("FILE"))


# What a preset sets, over the YAML file; a flag overrides it.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "strong": {
        **{"selection": "trigger", "masked": True, "unlearn": 0.5, "distill": 1.0, "interpolate": 0.3},
        **{"dtype": "auto", "lr": 0.02},
    },
}
FIELDS = fields.fields_of(Settings)


def names(*stages: Stage, decides: bool = True) -> tuple[str, ...]:
    """The settings that touch one of ``stages``; without ``decides`` also those that only say where or how fast."""
    about = {name: field.metadata for name, field in FIELDS.items()}
    return tuple(name for name, tags in about.items() if {*stages} & {*tags["stages"]} and (tags["decides"] or not decides))


def deciding_result() -> tuple[str, ...]:
    """The settings that a run's numbers, and the state of an unfinished one, depend on; any other may change."""
    return names(*Stage)


def deciding_ranking(settings: Settings) -> tuple[str, ...]:
    """The settings that the scores of a run depend on: runs alike in these (and in the record) rank alike."""
    race = ("p", "scope") if settings.ranking == "racing" else ()  # only the maps near the cut are scored in full
    return (*names(Stage.LOADING, Stage.RANKING), *race)


def deciding_inversion() -> tuple[str, ...]:
    """The settings that inverted triggers depend on: runs alike in these (and in the record) search once."""
    return names(Stage.LOADING, Stage.INVERSION)


def training_settings() -> tuple[str, ...]:
    """The settings that ``make_record.py`` trains an attacked model with; they are flags of it, too."""
    return names(Stage.TRAINING, decides=False)


def changed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings ``values`` that differ from the defaults of their preset."""
    defaults = dataclasses.asdict(Settings()) | PRESETS.get(values.get("preset", "paper"), {}) | {"preset": "paper"}

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value  # JSON has no tuples

    return {name: value for name, value in values.items() if plain(value) != plain(defaults.get(name)) and value is not None}


def unused(settings: Settings, select: str | None = None) -> list[str]:
    """What a run with these settings, or one that selects as ``select``, does not use of what differs from its preset."""
    select, schedule, tuning = select or settings.selection, settings.lr_scheduler, groups()[Stage.FINE_TUNING.value]
    needs = (
        ("--epochs of at least 1", settings.epochs > 0, [name for name in tuning if name not in ("epochs", "batch_size")]),
        ("--epochs of at least that number", settings.epochs >= settings.frequency_save, ["frequency_save"]),
        ("a drawn clean subset (--index names one)", settings.index is None, ["ratio"]),
        ("--selection frg", select in ("frg", "trigger"), groups()[Stage.RANKING.value]),
        ("--selection frg", select != "none", ["p", "scope", "masked"]),
        ("--selection trigger", select == "trigger", ["budget", "unlearn"]),
        ("several --frg_steps", settings.frg_steps > 1, ["alpha"]),
        ("--lr_scheduler StepLR", schedule == "StepLR", ["steplr_stepsize"]),
        ("--lr_scheduler MultiStepLR", schedule == "MultiStepLR", ["steplr_milestones"]),
        ("--lr_scheduler StepLR or MultiStepLR", schedule in ("StepLR", "MultiStepLR"), ["steplr_gamma"]),
    )
    without = {name: f"--{name} has no effect without {flag}" for flag, met, users in needs if not met for name in users}
    return [without[name] for name in changed(dataclasses.asdict(settings)) if name in without]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare one flag per setting, grouped by stage; see :func:`fmp_core.fields.add_flags`."""
    for title, grouped in groups().items():
        group = parser.add_argument_group(title)
        if title == Stage.RUN.value:
            group.add_argument("--yaml_path", default=None, metavar="FILE", help=f"settings file (default {DEFAULT_YAML})")
        fields.add_flags(group, Settings, grouped)


def groups() -> dict[str, list[str]]:
    """The settings of each group of ``--help``, in the order of a run."""
    found: dict[str, list[str]] = {}
    for name, field in FIELDS.items():
        found.setdefault(field.metadata["stages"][0].value, []).append(name)
    return found


def find_config(path: str) -> Path | None:
    """The settings file ``path``, from the current folder or else from beside the script; UserError if it is in neither.

    The default one, which states the defaults, may be missing (None), as where the package is installed.
    """
    for candidate in (Path(path), PROJECT / path):
        if candidate.is_file():
            return candidate
    if path == DEFAULT_YAML:
        return None
    if Path(path).exists():
        raise UserError(f"--yaml_path {path} {what_is_there(Path(path))}; name a settings file.")
    raise UserError(f"--yaml_path {path} does not exist; it was looked for in {Path.cwd()} and beside FMP, in {PROJECT}.")


def load_settings(flags: Mapping[str, Any]) -> Settings:
    """Merge defaults, the YAML file named by ``flags['yaml_path']`` (or the default one), the preset, and ``flags``. A preset
    that the file itself names sets only what the file leaves at its default.

    Raises:
        UserError: an unknown key or an impossible value anywhere, or --mean without --std.
    """
    for key in flags:
        if key not in FIELDS and key != "yaml_path" and flags[key] is not None:
            raise UserError(f"{key!r} is not a setting of FMP{did_you_mean(key, FIELDS)}; known settings: {', '.join(FIELDS)}.")
    path = find_config(str(flags.get("yaml_path") or DEFAULT_YAML))
    content = fields.read_yaml_mapping(path, "Settings file") if path else {}
    values, chosen = fields.parse_mapping(Settings, content, f"Settings file {path}"), fields.parse_flags(Settings, flags)
    own = {name: value for name, value in values.items() if value != FIELDS[name].default and not chosen.get("preset")}
    settings = Settings(**(values | PRESETS[chosen.get("preset") or values.get("preset") or "paper"] | own | chosen))
    if (settings.mean is None) != (settings.std is None):
        raise UserError("--mean and --std describe one preprocessing; give both, or leave both out.")
    return settings
