"""BackdoorBench's rules of poisoning: which images, which labels, how many; and the triggers users bring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fmp_core.attacks.poisoning import Poison, attack_labels, choose_test, choose_train, limit_train, make_stamp, poison
from fmp_core.attacks.settings import AttackSettings
from fmp_core.attacks.trigger_files import read_trigger
from fmp_core.data.datasets import Split
from fmp_core.errors import UserError
from fmp_core.fields import parse_flags
from PIL import Image

SIZE = (8, 8, 3)
LABELS = torch.arange(40) % 4
ALL = range(40)  # positions of the training images


def split(count: int = 40) -> Split:
    images = torch.randint(0, 200, (count, 3, 8, 8), generator=torch.Generator().manual_seed(count)).byte()
    return Split(LABELS[:count], lambda indices: images[torch.as_tensor(indices, dtype=torch.int64)])


def attack(name: str = "badnet", **changes: Any) -> AttackSettings:
    settings = AttackSettings(**parse_flags(AttackSettings, {"attack": name, "patch_size": 2, **changes}))
    settings.check(4)
    return settings


def made(seed: int = 0, **changes: Any) -> Poison:
    return poison(split(), split(12), attack(**changes), SIZE, 4, seed, ALL)


def test_all2one_poisons_any_class_and_tests_all_but_the_target():
    result = made(pratio=0.5, attack_target=1)
    assert len(result.train.indices) == 20 == len(set(result.train.indices)) and result.train.total == 40
    assert set(result.train.targets) == {1} and set(result.train.original) == {0, 1, 2, 3}  # the target class too
    assert result.train.original == LABELS[torch.tensor(result.train.indices)].tolist()
    assert result.test.indices == [i for i in range(12) if i % 4 != 1] and set(result.test.targets) == {1}
    assert torch.equal(result.test.images[:, :, :6], split(12).read(result.test.indices)[:, :, :6])
    assert (result.test.images[:, :, 6:, 6:] == 255).all() and (result.train.images[:, :, 6:, 6:] == 255).all()


def test_all2all_shifts_every_label_and_tests_every_image():
    result = made(attack_label_trans="all2all", pratio=0.5)
    assert result.test.indices == list(range(12)) and result.test.targets == [(i % 4 + 1) % 4 for i in range(12)]
    assert result.train.targets == [(label + 1) % 4 for label in result.train.original]
    assert attack_labels(torch.tensor([0, 3]), attack(attack_label_trans="all2all"), 4).tolist() == [1, 0]


def test_clean_label_poison_comes_from_the_target_class_only():
    result = made(name="sig", pratio=0.1, attack_target=2)
    assert len(result.train.indices) == 4  # the ratio is of the whole set
    assert set(result.train.original) == set(result.train.targets) == {2}
    assert set(result.test.original) == {0, 1, 3} and set(result.test.targets) == {2}
    whole_class = choose_train(LABELS, attack("sig", pratio=0.25, attack_target=2), 0, ALL)
    assert whole_class == [i for i in range(40) if i % 4 == 2]
    with pytest.raises(UserError, match=r"asks for 12 of 10; at most 0\.25 is possible"):
        choose_train(LABELS, attack("sig", pratio=0.3, attack_target=2), 0, ALL)


@pytest.mark.parametrize(("pratio", "count"), [(0.0, 0), (0.1, 4), (0.06, 2), (0.99, 40), (1.0, 40)])
def test_the_count_is_rounded_as_backdoorbench_does(pratio: float, count: int):
    assert len(choose_train(LABELS, attack(pratio=pratio), 0, ALL)) == count


def test_a_limited_training_set_is_drawn_and_poisoned_by_its_own_size():
    used = limit_train(40, 20, 0)
    assert used == limit_train(40, 20, 0) == sorted(set(used)) and len(used) == 20 and used != limit_train(40, 20, 1)
    assert list(limit_train(40, None, 0)) == list(range(40))
    result = poison(split(), split(12), attack(name="wanet", pratio=0.25), SIZE, 4, 0, used)
    assert result.cross is not None and result.train.total == 40
    assert len(result.train.indices) == 5 and len(result.cross.indices) == 10
    assert {*result.train.indices, *result.cross.indices} <= set(used)
    assert set(choose_train(LABELS, attack("sig", pratio=0.1, attack_target=2), 0, used)) <= {i for i in used if i % 4 == 2}


def test_a_ratio_of_no_image_is_refused():
    with pytest.raises(UserError, match="not even one"):
        choose_train(LABELS, attack(pratio=0.01), 0, ALL)


def test_the_draw_depends_on_the_seed_alone():
    one, same, other = (made(seed=seed).train.indices for seed in (0, 0, 1))
    assert one == same == sorted(one) and one != other
    assert made(name="blended").train.indices == one  # the same images whatever the trigger


def test_a_clean_control_has_triggers_in_the_test_set_only():
    result = made(pratio=0.0)
    assert result.train.indices == [] and result.train.images.shape == (0, 3, 8, 8)
    assert torch.equal(result.test.images, made(pratio=0.5).test.images)


def test_wanets_cross_images_keep_their_labels_and_count_as_poisoned_in_the_record():
    result = made(name="wanet", pratio=0.1, cross_ratio=2)
    assert result.cross is not None and len(result.cross.indices) == 8
    assert not set(result.cross.indices) & set(result.train.indices)
    assert result.cross.targets == result.cross.original
    together = result.recorded_train()
    assert list(together.indices) == sorted([*result.train.indices, *result.cross.indices])
    for part in (result.train, result.cross):
        for row, index in enumerate(part.indices):
            where = together.indices.index(index)
            assert torch.equal(together.images[where], part.images[row])
            assert (together.targets[where], together.original[where]) == (part.targets[row], part.original[row])
    assert made(name="wanet", cross_ratio=0).cross is None
    with pytest.raises(UserError, match="asks for 40 more images, but 20 are left"):
        made(name="wanet", pratio=0.5)


def test_many_images_are_stamped_in_parts(monkeypatch: pytest.MonkeyPatch):
    whole = made(name="wanet", pratio=0.5, cross_ratio=0.5)
    monkeypatch.setattr("fmp_core.attacks.poisoning.ROWS", 7)
    parts = made(name="wanet", pratio=0.5, cross_ratio=0.5)
    assert whole.cross is not None and parts.cross is not None
    assert torch.equal(whole.train.images, parts.train.images) and torch.equal(whole.cross.images, parts.cross.images)


# Triggers that users bring.


def test_an_image_becomes_the_mask_the_picture(tmp_path: Path):
    picture = np.random.default_rng(0).integers(1, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "t.png")
    expected = torch.from_numpy(picture).permute(2, 0, 1)
    file = str(tmp_path / "t.png")
    images, at = split().read([0, 1]), torch.tensor([0, 1])
    assert torch.equal(make_stamp(attack(trigger_file=file), SIZE, True, 40)(images, at)[1], expected)
    stamp = make_stamp(attack("blended", trigger_file=file, blend_alpha=1), SIZE, True, 40)
    assert torch.equal(stamp(images, at)[0], expected)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.full((8, 8, 3), 20, np.uint8), 20),
        (np.full((1, 8, 8, 3), 0.2, np.float32), 51),  # a third of BackdoorBench's LF patterns are shares of 255
        (np.full((8, 8), -3.0), -3),
        (np.full((8, 8, 3), 20.0, np.float32), 20),
    ],
)
def test_npy_patterns_are_in_grey_levels(array: np.ndarray, expected: float, tmp_path: Path):
    np.save(tmp_path / "t.npy", array)
    pattern = read_trigger(tmp_path / "t.npy", SIZE)
    assert pattern.shape == (3, 8, 8)
    torch.testing.assert_close(pattern.double(), torch.full((3, 8, 8), float(expected), dtype=torch.float64), rtol=1e-6, atol=0)


def test_a_pattern_lies_as_it_is_in_its_file(tmp_path: Path):
    values = np.arange(8 * 8 * 3).reshape(8, 8, 3)
    np.save(tmp_path / "t.npy", values)
    np.save(tmp_path / "grey.npy", values[..., 0])
    pattern, grey = read_trigger(tmp_path / "t.npy", SIZE), read_trigger(tmp_path / "grey.npy", SIZE)
    assert pattern.shape == (3, 8, 8) and pattern[2, 1, 5] == values[1, 5, 2]
    assert torch.equal(pattern, torch.from_numpy(values).permute(2, 0, 1).double()) and torch.equal(
        grey, pattern[:1].expand(3, 8, 8)
    )


def test_encoded_images_replace_their_originals(tmp_path: Path):
    rng = np.random.default_rng(0)
    train, test = (rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8) for count in (40, 12))
    files = {}
    for name, array in (("train", train), ("test", test)):
        np.save(tmp_path / f"{name}.npy", array)
        files[f"attack_{name}_replace_imgs_path"] = str(tmp_path / f"{name}.npy")
    result = made(name="ssba", **files)
    assert np.array_equal(result.train.images.permute(0, 2, 3, 1), train[result.train.indices])
    assert np.array_equal(result.test.images.permute(0, 2, 3, 1), test[result.test.indices])
    assert attack("ssba", **files).bb_name == "SSBA" and attack("ssba").bb_name == "ssba_like"
    files["attack_train_replace_imgs_path"] = files["attack_test_replace_imgs_path"]
    with pytest.raises(UserError, match=r"test\.npy holds uint8 \(12, 8, 8, 3\), but the dataset needs uint8 \(40, 8, 8, 3\)"):
        made(name="ssba", **files)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((8, 8, 3)), "is 0 everywhere"),
        (np.ones((9, 8, 3)), r"\(9, 8, 3\), but needs numbers of shape \(8, 8, 3\)"),
        (np.full((8, 8, 3), np.nan), "but needs numbers"),
        (np.array([{"a": 1}], dtype=object), "cannot be read as a .npy array"),
    ],
)
def test_an_unusable_pattern_is_one_sentence(array: np.ndarray, says: str, tmp_path: Path):
    np.save(tmp_path / "t.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=says):
        make_stamp(attack("lf", trigger_file=str(tmp_path / "t.npy")), SIZE, True, 40)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.full((8, 8, 3), -3.0), "has no value above 0"),
        (np.zeros((0, 8, 8, 3)), r"\(0, 8, 8, 3\), but needs numbers of shape"),
    ],
)
def test_a_patch_that_changes_nothing_is_refused(array: np.ndarray, says: str, tmp_path: Path):
    np.save(tmp_path / "t.npy", array)
    with pytest.raises(UserError, match=says):
        make_stamp(attack("badnet", trigger_file=str(tmp_path / "t.npy")), SIZE, True, 40)


@pytest.mark.parametrize("name", ["gone.npy", "gone.png"])
def test_a_missing_trigger_file_is_named(name: str, tmp_path: Path):
    with pytest.raises(UserError, match=name):
        make_stamp(attack("lf", trigger_file=str(tmp_path / name)), SIZE, True, 40)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attack_target": 4}, "--attack_target 4 is not one of the 4 classes"),
        ({"attack_target": -1}, "--attack_target is -1"),
        ({"pratio": 1.5}, "--pratio is 1.5, but must be a number of at least 0 and at most 1"),
        ({"pratio": float("nan")}, "--pratio is nan"),
        ({"name": "badnets"}, "--attack is 'badnets', but must be one of badnet, blended"),
        ({"attack_label_trans": "all2none"}, "--attack_label_trans is 'all2none'"),
        ({"name": "sig", "attack_label_trans": "all2all"}, "changes no label"),
        ({"name": "sig", "trigger_file": "t.png"}, "takes no --trigger_file"),
        ({"name": "ssba", "attack_train_replace_imgs_path": "t.npy"}, "belong together"),
        ({"patch_size": 9}, "--patch_size is 9, but the images are 8x8"),
        ({"name": "wanet", "k": 1}, "--k is 1, but must be a whole number of at least 2"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], says: str):
    with pytest.raises(UserError, match=says):
        made(**changes)


def test_a_test_set_of_the_target_class_alone_is_refused():
    assert choose_test(torch.zeros(3, dtype=torch.int64), attack()) == []
    with pytest.raises(UserError, match="no attack could be measured"):
        poison(split(), split(1), attack(), SIZE, 4, 0, ALL)


def test_flags_of_another_attack_are_known_as_such() -> None:
    assert attack("wanet", s=0.7).unused == ["patch_size"]
    assert attack("badnet").unused == [] and AttackSettings(blend_alpha=0.2, sig_f=3.0).unused == ["sig_f"]
