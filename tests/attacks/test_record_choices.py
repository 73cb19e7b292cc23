"""What a record depends on: which images are poisoned and tested, and flags that change nothing or do not fit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import make_record
import numpy as np
import pandas as pd
import pytest
import torch
from fmp_core.attacks import make_record as making
from fmp_core.attacks.poisoning import choose_train, make_noise_stamp
from fmp_core.attacks.settings import AttackSettings
from fmp_core.attacks.trigger_files import read_trigger
from fmp_core.data.clean_subset import choose_subset
from fmp_core.storage.torch_file import load_torch_file
from made_records import TRAIN, flags, make


def leave_unfinished(command: list[str]) -> None:
    """Train, and be interrupted before the record is written."""

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "write_record", stopped)
        assert make_record.main(command) == 130


@pytest.mark.parametrize("pratio", [0.1, 0.05])
def test_a_defender_with_the_attackers_seed_does_not_own_the_poisoned_images(pratio: float) -> None:
    labels = torch.zeros(5000, dtype=torch.int64)
    poisoned = set(choose_train(labels, AttackSettings(pratio=pratio), 0, range(5000)))
    owned = choose_subset(5000, 0.1, 0, None)
    assert abs(len(poisoned.intersection(owned)) / 500 - pratio) < 0.04  # four standard deviations


def test_an_unfinished_record_of_other_test_images_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "data"
    shutil.copytree(data, own)
    command = flags(own, tmp_path, "--save_folder_name", "mine")
    leave_unfinished(command)
    (own / "toys" / "test" / "class0" / "00.png").unlink()
    assert make_record.main(command) == 2
    assert "images " in capsys.readouterr().err
    (tmp_path / "record" / ".mine.unfinished" / ".hidden" / "inner").mkdir(parents=True)
    assert make_record.main([*command, "--fresh"]) == 0


@pytest.mark.parametrize(
    ("name", "other", "says"),
    [
        ("TRAINING_CODE", "another", "digest of the code"),
        ("training_precision", lambda *_: torch.bfloat16, "precision torch.float32 (now torch.bfloat16)"),
    ],
    ids=["code", "precision"],
)
def test_an_unfinished_record_of_other_code_or_precision_is_refused(
    name: str,
    other: Any,
    says: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = flags(data, tmp_path, "--save_folder_name", "mine", "--amp", "False")
    leave_unfinished(command)
    monkeypatch.setattr(making, name, other)
    assert make_record.main(command) == 2
    assert says in capsys.readouterr().err


def test_there_is_no_accuracy_of_clean_images_where_none_is_trained_on(data: Path, tmp_path: Path) -> None:
    folder = make(data, tmp_path, "--pratio", "1", "--epochs", "1")
    assert load_torch_file(folder / "train_poison_index_list.pickle").sum() == TRAIN
    columns = pd.read_csv(folder / "attack_df.csv", index_col=0).columns
    assert "train_acc_clean_only" not in columns and "train_asr_bd_only" in columns


def test_the_noise_of_wanet_depends_on_the_seed_and_on_the_image() -> None:
    images, places = torch.full((3, 3, 32, 32), 9, dtype=torch.uint8), torch.tensor([0, 1, 1])
    images[:, :, 8:24, 8:24] = 200
    one, other = (make_noise_stamp(AttackSettings("wanet", trigger_seed=seed, s=0.0), (32, 32, 3)) for seed in (0, 1))
    first, second, again = one(images, places)
    assert torch.equal(second, again) and not torch.equal(first, second)
    assert not torch.equal(one(images, places), other(images, places))


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.float32, np.bool_])
def test_a_mask_of_zeros_and_ones_is_white(kind: type, tmp_path: Path) -> None:
    mask = np.zeros((8, 8), kind)
    mask[-2:, -2:] = 1
    np.save(tmp_path / "mask.npy", mask)
    assert read_trigger(tmp_path / "mask.npy", (8, 8, 3)).unique().tolist() == [0, 255]


@pytest.mark.parametrize(
    ("given", "unused"),
    [
        ({"attack": "badnet", "trigger_file": "f", "patch_size": 9}, ["patch_size"]),
        ({"attack": "badnet", "trigger_seed": 1}, ["trigger_seed"]),
        ({"attack": "blended", "trigger_seed": 1}, []),
        ({"attack": "lf", "trigger_file": "f", "trigger_seed": 1, "lf_amplitude": 9.0}, ["trigger_seed", "lf_amplitude"]),
        ({"attack": "ssba", "attack_train_replace_imgs_path": "f", "ssba_strength": 9.0}, ["ssba_strength"]),
        ({"attack_label_trans": "all2all", "attack_target": 10}, ["attack_target"]),
        ({"attack": "none", "attack_target": 3, "trigger_file": "f"}, ["attack_target", "trigger_file"]),
    ],
)
def test_a_flag_in_whose_place_something_else_stands_is_known_to_be_unused(given: dict[str, Any], unused: list[str]) -> None:
    settings = AttackSettings(**given)
    assert settings.unused == unused
    if unused == ["attack_target"]:
        settings.check(10)


def test_the_images_of_a_known_dataset_have_the_size_that_backdoorbench_gives_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = ["--dataset", "cifar10", "--dataset_path", str(tmp_path), "--record_root", str(tmp_path)]
    assert make_record.main([*nowhere, "--image_size", "64"]) == 2
    assert "--image_size is 64, but BackdoorBench has cifar10 at 32x32" in capsys.readouterr().err
    assert make_record.main([*nowhere, "--image_size", "32"]) == 2
    assert "cifar10" in (said := capsys.readouterr().err) and "--image_size" not in said


def test_a_datasets_name_may_end_with_a_slash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--dataset_path", str(tmp_path / "elsewhere"), "--record_root", str(tmp_path)]
    assert make_record.main(["--dataset", "mine/", *where]) == 2
    assert str(tmp_path / "elsewhere" / "mine") in capsys.readouterr().err


def test_a_flag_that_changes_nothing_is_said_to(data: Path, tmp_path: Path) -> None:
    (log,) = make(data, tmp_path, "--epochs", "1", "--blend_alpha", "0.5", "--trigger_seed", "3").glob("*.log")
    for name in ("blend_alpha", "trigger_seed"):
        assert f"--{name} changes nothing of --attack badnet" in log.read_text()
