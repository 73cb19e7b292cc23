"""One run's settings: dataclass defaults < YAML file < command-line flags."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fmp_core.errors import UserError

LARGEST_YAML = 2**18  # bytes; ours have 3000
DEFAULT_YAML = "./config/defense/fmp/config.yaml"
PROJECT = Path(__file__).resolve().parents[2]  # holds config/, in a BackdoorBench checkout too


class Kind(NamedTuple):
    """How a setting's text or YAML value is read; ``parse`` raises ValueError on an impossible value."""

    parse: Callable[[Any], Any]
    expects: str


def _integer(low: int, high: int | None = None) -> Kind:
    def parse(value: Any) -> int:
        if isinstance(value, bool) or int(str(value)) < low or (high is not None and int(str(value)) > high):
            raise ValueError
        return int(str(value))

    return Kind(parse, f"a whole number of at least {low}" + ("" if high is None else f" and at most {high}"))


def _number(low: float, high: float = float("inf"), *, above: bool = False) -> Kind:
    """A finite number in [low, high], or ]low, high] with ``above``; fractions such as ``1/255`` are welcome."""

    def parse(value: Any) -> float:
        if isinstance(value, bool):
            raise ValueError
        numerator, _, denominator = str(value).partition("/")
        number = float(numerator) / float(denominator or 1)
        if not math.isfinite(number) or not (low < number if above else low <= number) or number > high:
            raise ValueError
        return number

    bound = f"above {low:g}" if above else f"of at least {low:g}"
    return Kind(parse, f"a number {bound}" + (f" and at most {high:g}" if high < float("inf") else ""))


def _choice(*names: str) -> Kind:
    def parse(value: Any) -> str:
        if value not in names:
            raise ValueError
        return str(value)

    return Kind(parse, "one of " + ", ".join(names))


def _parse_boolean(value: Any) -> bool:
    text = str(value).lower()
    if text not in ("true", "false", "1", "0"):
        raise ValueError
    return text in ("true", "1")


def _parse_text(value: Any) -> str:
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError
    return str(value)


def _parse_name(value: Any) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._=-]{0,99}", str(value)):
        raise ValueError
    return str(value)


def _parse_milestones(value: Any) -> tuple[int, ...]:
    parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
    return tuple(_integer(1).parse(part) for part in parts)


_BOOLEAN = Kind(_parse_boolean, "True or False")
_TEXT = Kind(_parse_text, "a text")
_NAME = Kind(_parse_name, "a folder name of letters, digits, '.', '_', '=' and '-'")
_SAMPLES = Kind(lambda v: "all" if v == "all" else _integer(1).parse(v), "a whole number of at least 1, or all")
_CHUNK = Kind(lambda v: "auto" if v == "auto" else _integer(1).parse(v), "a whole number of at least 1, or auto")
_MILESTONES = Kind(_parse_milestones, "epochs separated by commas, such as 5,8")


def _setting(default: Any, kind: Kind, help: str, short: str | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"kind": kind, "help": help, "short": short})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting of a run. A field is a flag (``--name``) and a YAML key of the same name.

    Names are BackdoorBench's wherever BB has the flag (``defense/ft.py``, ``defense/fp.py``).
    """

    preset: str = _setting("paper", _choice("paper", "strong"), "strong: see docs/strong.md; flags override it")
    result_file: str | None = _setting(None, _TEXT, "the attack record: a folder name below --record_root")
    record_root: str = _setting("./record", _TEXT, "the folder of attack records")
    dataset_path: str = _setting("./data", _TEXT, "the folder of datasets; the dataset's name is appended")
    dataset: str | None = _setting(None, _TEXT, "checked against the record")
    model: str | None = _setting(None, _TEXT, "checked against the record")
    num_classes: int | None = _setting(None, _integer(2), "checked against the record")
    device: str = _setting("auto", _TEXT, "auto (CUDA where there is one), cpu, cuda, cuda:0 or cuda:0,1")
    random_seed: int = _setting(0, _integer(0, 2**32 - 1), "seed of the clean subset, the FRG noise and fine-tuning")

    ratio: float = _setting(0.1, _number(0, 1, above=True), "share of the clean training set the defender owns")
    index: str | None = _setting(None, _TEXT, "text file of clean-training-set indices to use instead of --ratio")

    p: int = _setting(64, _integer(1), "the N/p lowest feature maps are pruned")
    eps: float = _setting(1 / 255, _number(0, 1, above=True), "FRG perturbation bound in pixel space [0,1], e.g. 1/255")
    frg_steps: int = _setting(1, _integer(1), "FRG gradient steps; 1 is Algorithm 1")
    alpha: float | None = _setting(
        None, _number(0, 1, above=True), "FRG step size if frg_steps > 1 (default 2.5*eps/frg_steps)"
    )
    frg_samples: int | str = _setting(32, _SAMPLES, "clean images each feature map is scored on, or all")
    scope: str = _setting("layer", _choice("layer", "global"), "choose N/p in each layer, or of all maps together")
    selection: str = _setting(
        "frg",
        _choice("frg", "trigger", "random", "none"),
        "by FRG's count, or by how far a inverted trigger moves maps (strong); the ablations take as many by chance, or none",
    )
    budget: float = _setting(0.05, _number(0, 1), "with selection trigger: accuracy on clean images that pruning may cost")
    unlearn: bool = _setting(False, _BOOLEAN, "with selection trigger: fine-tune on images with inverted triggers, too")
    distill: float = _setting(
        0.0, _number(0), "weight of keeping the attacked model's answers to clean images while fine-tuning (distillation)"
    )
    masked: bool = _setting(False, _BOOLEAN, "keep pruned feature maps at zero while fine-tuning")

    ranking: str = _setting(
        "exact", _choice("exact", "racing"), "score every map on every image, or drop maps early that will not be chosen"
    )
    dtype: str = _setting("fp32", _choice("fp32", "bf16", "auto"), "precision of ranking; auto: bf16 if in hardware")
    chunk: int | str = _setting("auto", _CHUNK, "images per batch of ranking")
    memory: int | None = _setting(None, _integer(64), "MiB that ranking may keep; lowers the chunk")
    fresh: bool = _setting(False, _BOOLEAN, "start afresh: use neither cached scores nor the state of an interrupted run")

    epochs: int = _setting(10, _integer(0), "fine-tuning epochs; 0 prunes and evaluates only")
    batch_size: int = _setting(256, _integer(2), "batch size of fine-tuning and evaluation")
    lr: float = _setting(0.01, _number(0, above=True), "learning rate")
    lr_scheduler: str = _setting(
        "CosineAnnealingLR", _choice("CosineAnnealingLR", "StepLR", "MultiStepLR"), "learning-rate schedule, per epoch"
    )
    steplr_stepsize: int = _setting(5, _integer(1), "StepLR: epochs between steps")
    steplr_gamma: float = _setting(0.1, _number(0, above=True), "StepLR, MultiStepLR: factor of a step")
    steplr_milestones: tuple[int, ...] = _setting((5, 8), _MILESTONES, "MultiStepLR: epochs of the steps, e.g. 5,8")
    client_optimizer: str = _setting("sgd", _choice("sgd"), "optimizer of fine-tuning")
    sgd_momentum: float = _setting(0.9, _number(0, 1), "momentum of SGD")
    wd: float = _setting(5e-4, _number(0), "weight decay of SGD")
    amp: bool = _setting(True, _BOOLEAN, "fine-tune under bfloat16 autocast where the device has it in hardware")
    frequency_test: int = _setting(1, _integer(0), "test every n-th epoch; 0 tests after the last only")
    frequency_save: int = _setting(0, _integer(0), "save the model every n-th epoch into checkpoint/; 0 never")

    wait: bool = _setting(False, _BOOLEAN, "wait while another run works in the same result folder, instead of ending")
    defense_name: str = _setting("fmp", _NAME, "the result folder's name below record/<record>/defense")
    report: bool = _setting(True, _BOOLEAN, "write report.html beside the results")
    tensorboard: bool = _setting(False, _BOOLEAN, "also write TensorBoard event files into tensorboard/")
    log: str | None = _setting(None, _TEXT, "folder of the log (default: log/ in the result folder)")
    checkpoint_save: str | None = _setting(None, _TEXT, "folder of saved epochs (default: checkpoint/ in the result folder)")

    num_workers: float = _setting(0, _number(0), "no effect (BackdoorBench's flag): data lives on the device")
    pin_memory: bool = _setting(True, _BOOLEAN, "no effect (BackdoorBench's flag)", "-pm")
    non_blocking: bool = _setting(True, _BOOLEAN, "no effect (BackdoorBench's flag)", "-nb")
    prefetch: bool = _setting(False, _BOOLEAN, "no effect (BackdoorBench's flag)", "-pf")
    checkpoint_load: str | None = _setting(None, _TEXT, "no effect (BackdoorBench's flag)")


# What a preset sets, over the YAML file; a flag overrides it.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "strong": {"selection": "trigger", "masked": True, "unlearn": True, "distill": 1.0, "dtype": "auto", "lr": 0.02},
}
FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare one flag per setting, all defaulting to None so that a YAML value is overridden only by a flag given."""
    parser.add_argument("--yaml_path", default=None, help=f"settings file (default {DEFAULT_YAML})")
    for name, field in FIELDS.items():
        short = [field.metadata["short"]] if field.metadata["short"] else []
        # Values stay text here and are parsed in one place, so a bad YAML key and a bad flag read alike.
        # A bare ``--amp`` or ``--fresh`` means True, as users type it; BB's ``--amp True`` works too.
        bare: dict[str, Any] = {"nargs": "?", "const": "True"} if field.metadata["kind"] is _BOOLEAN else {}
        parser.add_argument(*short, f"--{name}", default=None, metavar=name.upper(), help=field.metadata["help"], **bare)


def parse_value(name: str, value: Any, source: str) -> Any:
    """Parse one setting.

    Raises:
        UserError: the value is impossible; names ``source`` (a flag or a file and key).
    """
    kind = FIELDS[name].metadata["kind"]
    try:
        return kind.parse(value)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        raise UserError(f"{source} is {value!r}, but must be {kind.expects}.") from None


def find_config(path: str) -> Path:
    """The settings file ``path``, from the current folder or else from beside the script.

    Raises:
        UserError: it is in neither place.
    """
    for candidate in (Path(path), PROJECT / path):
        if candidate.is_file():
            return candidate
    raise UserError(f"--yaml_path {path} does not exist, neither in {Path.cwd()} nor in {PROJECT}.")


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few of them can stand for a value whose text fills any memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("settings need no *aliases")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file; blank values are left out, as BackdoorBench does.

    Raises:
        UserError: not readable YAML, not a mapping, an unknown key or an impossible value.
    """
    try:
        if path.stat().st_size > LARGEST_YAML:
            raise OSError(f"it is larger than {LARGEST_YAML >> 10} KiB")
        content = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"Settings file {path} cannot be read as YAML: {detail}.") from None
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise UserError(f"Settings file {path} must hold 'key: value' lines, not a {type(content).__name__}.")
    for key in content:
        if key not in FIELDS:
            raise UserError(f"Settings file {path} has the unknown key {key!r}; known keys: {', '.join(FIELDS)}.")
    return {k: parse_value(k, v, f"{k} in {path}") for k, v in content.items() if v is not None}


def load_settings(flags: Mapping[str, Any]) -> Settings:
    """Merge defaults, the YAML file named by ``flags['yaml_path']`` (or the default one), the preset, and ``flags``.

    Raises:
        UserError: an unknown key or an impossible value anywhere.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    yaml_path = given.pop("yaml_path", DEFAULT_YAML)
    for key in given:
        if key not in FIELDS:
            raise UserError(f"{key!r} is not a setting of FMP; known settings: {', '.join(FIELDS)}.")
    values = read_yaml(find_config(str(yaml_path)))
    chosen = {key: parse_value(key, value, f"--{key}") for key, value in given.items()}
    values |= PRESETS[chosen.get("preset") or values.get("preset") or "paper"] | chosen
    return Settings(**values)
