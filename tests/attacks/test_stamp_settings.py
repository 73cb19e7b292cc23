"""Every setting of an attack reaches its trigger, and those of other attacks do not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from fmp_core.attacks.poisoning import make_noise_stamp, make_stamp
from fmp_core.attacks.settings import ATTACKS, AttackSettings
from torch import Tensor

SIZE = (16, 16, 3)
OTHERWISE: dict[str, Any] = {
    "trigger_seed": 1,
    "patch_size": 5,
    "blend_alpha": 0.5,
    "lf_amplitude": 20.0,
    "sig_delta": 10.0,
    "sig_f": 3.0,
    "s": 3.0,
    "k": 3,
    "grid_rescale": 0.5,
    "ssba_strength": 30.0,
}
IMAGES = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
PLACES = torch.tensor([0, 4, 9])


def stamped(attack: str, train: bool = True, **changes: Any) -> Tensor:
    return make_stamp(AttackSettings(attack, **changes), SIZE, train, 10)(IMAGES, PLACES)


def test_no_setting_is_left_out_here() -> None:
    own = {field.name for field in dataclasses.fields(AttackSettings) if "attack" in field.metadata}
    assert own == {*OTHERWISE, "cross_ratio", "attack_train_replace_imgs_path", "attack_test_replace_imgs_path"} - {
        "trigger_seed"
    }


@pytest.mark.parametrize("attack", [name for name in ATTACKS if name != "none"])
def test_a_setting_changes_the_trigger_or_is_known_to_change_nothing(attack: str) -> None:
    usual = stamped(attack)
    for name, value in OTHERWISE.items():
        changes_nothing = torch.equal(stamped(attack, **{name: value}), usual)
        assert AttackSettings(attack, **{name: value}).unused == ([name] if changes_nothing else []), name
    assert torch.equal(stamped(attack, train=False), usual)  # the trigger that is tested is the one that was learnt


@pytest.mark.parametrize("name", ["trigger_seed", "s", "k", "grid_rescale"])
def test_the_noise_mode_of_wanet_has_the_same_settings(name: str) -> None:
    usual, other = (make_noise_stamp(AttackSettings("wanet", **given), SIZE) for given in ({}, {name: OTHERWISE[name]}))
    assert not torch.equal(usual(IMAGES, PLACES), other(IMAGES, PLACES))
