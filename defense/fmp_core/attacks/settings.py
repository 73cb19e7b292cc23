"""What an attack of ``make_record.py`` is made of: settings, flags, and the ranges they are checked against."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from fmp_core.errors import UserError

LABELS = ("all2one", "all2all")
# Our names -> what info.pickle calls the attack. ssba is SSBA only when its images were made by SSBA's encoder.
BB_NAMES = {
    "badnet": "badnet",
    "blended": "blended",
    "lf": "lowFrequency",
    "sig": "sig",
    "wanet": "wanet",
    "ssba": "ssba_like",
    "none": "none",
}


def _flag(default: Any, help: str, *range_: float) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "range": range_})


@dataclasses.dataclass(frozen=True)
class AttackSettings:
    """A field is a flag of the same name; names are BackdoorBench's where BB has the flag (``config/attack/*``)."""

    attack: str = _flag("badnet", f"one of {', '.join(BB_NAMES)}")
    attack_label_trans: str = _flag("all2one", "all2one (--attack_target), or all2all (the next class)")
    attack_target: int = _flag(0, "the class that all2one and clean-label attacks aim at")
    pratio: float = _flag(0.1, "share of all training images that get the trigger; 0 makes a clean control", 0, 1)
    trigger_seed: int = _flag(0, "seed of the triggers that are drawn (blended, lf, wanet, ssba)", 0, 2**30)
    trigger_file: str | None = _flag(None, "badnet: mask image; blended: picture; lf: .npy pattern (BackdoorBench's or yours)")
    patch_size: int = _flag(5, "badnet: side of the white corner patch; BackdoorBench's CIFAR patch has 3", 1, 4096)
    blend_alpha: float = _flag(0.2, "blended: share of the picture", 0, 1)
    lf_amplitude: float = _flag(51.0, "lf: largest grey-level change of our own pattern", 1, 255)
    sig_delta: float = _flag(40.0, "sig: amplitude in grey levels", 0, 255)
    sig_f: float = _flag(6.0, "sig: periods across the image", 0, 4096)
    s: float = _flag(0.5, "wanet: strength of the warp", 0, 100)
    k: int = _flag(4, "wanet: control points along each axis", 2, 4096)
    grid_rescale: float = _flag(1.0, "wanet: factor on the warped positions", 0, 10)
    cross_ratio: float = _flag(2.0, "wanet: images with a noisy warp and their own label, per poisoned image", 0, 100)
    ssba_strength: float = _flag(8.0, "ssba: root mean square of the perturbation, in grey levels", 0, 255)
    attack_train_replace_imgs_path: str | None = _flag(None, "ssba: .npy of all training images, encoded (BackdoorBench's)")
    attack_test_replace_imgs_path: str | None = _flag(None, "ssba: .npy of all test images, encoded")

    @property
    def clean_label(self) -> bool:
        return self.attack == "sig"

    @property
    def bb_name(self) -> str:
        """The attack's name in ``info.pickle``."""
        encoded = self.attack == "ssba" and self.attack_train_replace_imgs_path
        return "SSBA" if encoded else BB_NAMES[self.attack]

    def check(self, num_classes: int) -> None:
        """Raises UserError: a value is impossible, or two do not go together."""
        for field in dataclasses.fields(self):
            value, limits = getattr(self, field.name), field.metadata["range"]
            if limits and not limits[0] <= value <= limits[1]:
                raise UserError(f"--{field.name} is {value:g}, but must be between {limits[0]:g} and {limits[1]:g}.")
        for name, choices in (("attack", tuple(BB_NAMES)), ("attack_label_trans", LABELS)):
            if getattr(self, name) not in choices:
                raise UserError(f"--{name} is {getattr(self, name)}, but must be one of {', '.join(choices)}.")
        if not 0 <= self.attack_target < num_classes:
            raise UserError(
                f"--attack_target {self.attack_target} is not one of the {num_classes} classes 0..{num_classes - 1}."
            )
        if self.clean_label and self.attack_label_trans != "all2one":
            raise UserError(f"--attack {self.attack} changes no label, so --attack_label_trans must be all2one.")
        if self.trigger_file and self.attack not in ("badnet", "blended", "lf"):
            raise UserError(f"--attack {self.attack} takes no --trigger_file; leave it out.")
        replaced = [self.attack_train_replace_imgs_path, self.attack_test_replace_imgs_path]
        if any(replaced) and (self.attack != "ssba" or not all(replaced)):
            raise UserError(
                "--attack_train_replace_imgs_path and --attack_test_replace_imgs_path belong together and to --attack ssba."
            )


def add_attack_arguments(parser: argparse._ActionsContainer) -> None:
    """On a parser or an argument group, declare one flag per field."""
    for field in dataclasses.fields(AttackSettings):
        kind = type(field.default) if field.default is not None else str
        shown = "" if field.default is None else f" (default {field.default})"
        parser.add_argument(
            f"--{field.name}", type=kind, default=field.default, metavar="VALUE", help=field.metadata["help"] + shown
        )


def attack_settings(args: argparse.Namespace) -> AttackSettings:
    """The flags of :func:`add_attack_arguments` as settings; :meth:`AttackSettings.check` says whether they are possible."""
    return AttackSettings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(AttackSettings)})
