"""Settings of ``make_record.py``: the record and the attack, declared as those of ``fmp.py`` (:mod:`fmp_core.fields`)."""

from __future__ import annotations

import dataclasses
from typing import Any

from fmp_core.errors import UserError
from fmp_core.fields import BOOLEAN, NAME, Kind, choice, integer, number, setting, text

ATTACKS = ("badnet", "blended", "lf", "sig", "wanet", "ssba", "none")


@dataclasses.dataclass(frozen=True)
class RecordSettings:
    """Where a record goes, and what it is of; a field is a flag of the same name."""

    save_folder_name: str | None = setting(None, NAME, "the record's name (default <attack>_<dataset>)")
    record_root: str = setting("./record", text("FOLDER"), "the folder of attack records")
    dataset_path: str = setting("./data", text("FOLDER"), "the folder of datasets")
    dataset: str = setting(
        "digits",
        text("NAME"),
        "digits, cifar10, cifar100, gtsrb, tiny, or a folder train|test/<class>/*, here or below --dataset_path",
    )
    image_size: int | None = setting(
        None, integer(8, 1024, metavar="PIXELS"), "height and width of the images of a folder (default 32)"
    )
    limit_train: int | None = setting(
        None, integer(2), "train on N of the training images, drawn by --random_seed; --pratio is a share of these"
    )
    model: str = setting("resnet18", text("NAME"), "BackdoorBench's name of the model; an unknown one prints the list")
    fresh: bool = setting(False, BOOLEAN, "start again instead of going on with an unfinished record")


def _of(attack: str, default: Any, kind: Kind, help: str) -> Any:
    """A setting that only ``attack`` uses."""
    return setting(default, kind, f"{attack}: {help}", attack=attack)


@dataclasses.dataclass(frozen=True)
class AttackSettings:
    """A field is a flag of the same name; names are BackdoorBench's where BB has the flag (``config/attack/*``)."""

    attack: str = setting("badnet", choice(*ATTACKS), "the attack; none trains a model that never saw a trigger")
    attack_label_trans: str = setting(
        "all2one", choice("all2one", "all2all"), "all2one: to --attack_target; all2all: to the next class"
    )
    attack_target: int = setting(0, integer(0, metavar="CLASS"), "the class that all2one and clean-label attacks aim at")
    pratio: float = setting(
        0.1, number(0, 1, metavar="RATIO"), "share of all training images that get the trigger; 0 makes a clean control"
    )
    trigger_seed: int = setting(
        0, integer(0, 2**30, metavar="SEED"), "seed of the triggers that are drawn (blended, lf, wanet, ssba)"
    )
    trigger_file: str | None = setting(
        None, text("FILE"), "badnet: mask image; blended: picture; lf: .npy pattern (BackdoorBench's or yours)"
    )
    patch_size: int | None = _of(
        "badnet",
        None,
        integer(1, 4096, metavar="PIXELS"),
        "side of the white corner patch (default as BackdoorBench: 3 at 32x32, its mask resized elsewhere)",
    )
    blend_alpha: float = _of("blended", 0.2, number(0, 1, metavar="SHARE"), "share of the picture")
    lf_amplitude: float = _of("lf", 51.0, number(1, 255, metavar="LEVELS"), "largest change by our own pattern, in grey levels")
    sig_delta: float = _of("sig", 40.0, number(0, 255, metavar="LEVELS"), "amplitude in grey levels")
    sig_f: float = _of("sig", 6.0, number(0, 4096), "periods across the image")
    s: float = _of("wanet", 0.5, number(0, 100), "strength of the warp")
    k: int = _of("wanet", 4, integer(2, 4096), "control points along each axis")
    grid_rescale: float = _of("wanet", 1.0, number(0, 10, metavar="FACTOR"), "factor on the warped positions")
    cross_ratio: float = _of(
        "wanet", 2.0, number(0, 100, metavar="RATIO"), "images with a noisy warp and their own label, per poisoned image"
    )
    ssba_strength: float = _of(
        "ssba", 8.0, number(0, 255, metavar="LEVELS"), "root mean square of the perturbation, in grey levels"
    )
    attack_train_replace_imgs_path: str | None = _of(
        "ssba", None, text("FILE"), ".npy of all training images, encoded (BackdoorBench's)"
    )
    attack_test_replace_imgs_path: str | None = _of("ssba", None, text("FILE"), ".npy of all test images, encoded")

    @property
    def unused(self) -> list[str]:
        """Settings that were given and change nothing: of another attack, or a file or another setting takes their place."""
        replaced = {"patch_size", "lf_amplitude"} if self.trigger_file else set()
        replaced |= {"ssba_strength"} if self.attack_train_replace_imgs_path else set()
        replaced |= {"trigger_seed"} if not self.draws_trigger else set()
        replaced |= {"attack_target"} if self.attack_label_trans == "all2all" else set()
        if self.attack == "none":
            replaced = {field.name for field in dataclasses.fields(self)} - {"attack"}
        given = (field for field in dataclasses.fields(self) if getattr(self, field.name) != field.default)
        return [f.name for f in given if f.name in replaced or f.metadata.get("attack", self.attack) != self.attack]

    @property
    def draws_trigger(self) -> bool:
        """Whether the trigger depends on ``trigger_seed``."""
        drawn = self.attack in ("blended", "lf", "wanet", "ssba")
        return drawn and not self.trigger_file and not self.attack_train_replace_imgs_path

    @property
    def clean_label(self) -> bool:
        return self.attack == "sig"

    @property
    def bb_name(self) -> str:
        """The attack's name in ``info.pickle``; ssba is SSBA only when its images were made by SSBA's encoder."""
        if self.attack_train_replace_imgs_path:
            return "SSBA"
        return {"lf": "lowFrequency", "ssba": "ssba_like"}.get(self.attack, self.attack)

    def check(self, num_classes: int) -> None:
        """Raises UserError: no attack on a dataset of ``num_classes`` classes, or two values do not go together."""
        if self.attack_target >= num_classes and self.attack != "none" and self.attack_label_trans == "all2one":
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
