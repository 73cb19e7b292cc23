"""Bad input: one sentence, exit code 2, no files."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import QUICK, Edit, Run, listing, refuses
from conftest import MODEL, RECORD
from fmp_core.errors import UserError
from fmp_core.inputs import _check_trainable
from fmp_core.models.build import build_model
from hostile_files import Call
from PIL import Image


def set_to(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.__setitem__(key, value)


def truncate(root: Path, edit: Edit) -> None:
    path = root / "record" / RECORD / "attack_result.pt"
    path.write_bytes(path.read_bytes()[:-10_000])


def empty(root: Path, edit: Edit) -> None:
    shutil.rmtree(root / "record" / RECORD)
    (root / "record" / RECORD).mkdir()


def hostile(root: Path, edit: Edit) -> None:
    edit(root / "record" / RECORD, set_to("epoch", Call(os.mkdir, "pwned")))


def lose_images(root: Path, edit: Edit) -> None:
    shutil.rmtree(root / "record" / RECORD / "bd_test_dataset" / "3")


def break_image(root: Path, edit: Edit) -> None:
    next((root / "record" / RECORD / "bd_test_dataset" / "3").iterdir()).write_bytes(b"no image")


def lose_data(root: Path, edit: Edit) -> None:
    shutil.rmtree(root / "data")


def lose_batch(root: Path, edit: Edit) -> None:
    (root / "data" / "cifar10" / "cifar-10-batches-py" / "test_batch").unlink()


def shuffle_labels(root: Path, edit: Edit) -> None:
    path = root / "data" / "cifar10" / "cifar-10-batches-py" / "test_batch"
    batch = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps({**batch, "labels": batch["labels"][::-1]}, protocol=2))


def eleven_classes(root: Path, edit: Edit) -> None:
    edit(root / "record" / RECORD, set_to("num_classes", 11))


def another_model(root: Path, edit: Edit) -> None:
    edit(root / "record" / RECORD, set_to("model_name", "resnet18"))


def unknown_model(root: Path, edit: Edit) -> None:
    edit(root / "record" / RECORD, set_to("model_name", "senet18"))


def another_dataset(root: Path, edit: Edit) -> None:
    edit(root / "record" / RECORD, set_to("clean_data", "cifar100"))


def lose_weights(root: Path, edit: Edit) -> None:
    edit(root / "record" / RECORD, lambda content: content["model"].popitem())


def toys_with_too_few_classes(root: Path, edit: Edit) -> None:
    for part in ("train", "test"):
        for label in range(12):
            file = root / "data" / "toys" / part / f"{label:02d}" / "a.png"
            file.parent.mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(file)
    edit(root / "record" / RECORD, set_to("clean_data", "toys"))


BAD_FILES: dict[str, tuple[Callable[[Path, Edit], None], str]] = {
    "truncated record": (truncate, "attack_result.pt is not a whole torch file"),
    "empty folder": (empty, "holds no attack_result.pt"),
    "foreign global": (hostile, "posix.mkdir"),
    "poisoned images missing": (lose_images, "1 of 9 poisoned test images are missing"),
    "poisoned image broken": (break_image, "3.png cannot be decoded"),
    "data folder missing": (lose_data, "Dataset folder data/cifar10 does not exist"),
    "data file missing": (lose_batch, "test_batch is missing"),
    "test set in another order": (shuffle_labels, "only 0 are those of the clean test images at these positions"),
    "wrong num_classes": (eleven_classes, "the architecture or the number of classes is another"),
    "wrong model": (another_model, "lacks the weights layer1.1.conv1.weight of resnet18"),
    "unknown model": (unknown_model, "Model 'senet18' is not one of BackdoorBench's"),
    "wrong dataset": (another_dataset, "Dataset folder data/cifar100 does not exist"),
    "weights missing": (lose_weights, "lacks the weights fc.bias"),
    "labels beyond the model": (toys_with_too_few_classes, "labelled 0..11"),
}
BAD_FLAGS: dict[tuple[str, ...], str] = {
    ("--result_file", "gone"): "Record folder record/gone does not exist; check",
    ("--result_file", "badnet_tny"): "Record folder record/badnet_tny does not exist (did you mean badnet_tiny?)",
    ("--result_file", "record/badnet_tiny"): "names a record below --record_root record: give --result_file badnet_tiny.",
    ("--eps", "0"): "--eps is '0'",
    ("--ratio", "1.5"): "--ratio is '1.5'",
    ("--ratio", "0.001"): "--ratio 0.001 of 50 clean training images",
    ("--p", "0"): "--p is '0'",
    ("--amp", "ture"): "--amp is 'ture'",
    ("--scope", "all"): "--scope is 'all'",
    ("--device", "cuda:9"): "--device cuda:9",
    ("--device", "gpu"): "--device is 'gpu', but must be auto, cpu",
    ("--dataset", "gtsrb"): "dataset is set to gtsrb, but the record in record/badnet_tiny has cifar10",
    ("--model", "resnet18"): f"model is set to resnet18, but the record in record/badnet_tiny has {MODEL}",
    ("--num_classes", "43"): "num_classes is set to 43, but the record in record/badnet_tiny has 10",
    ("--yaml_path", "config/defense/fmp/gtsrb.yaml"): "dataset is set to gtsrb",
    ("--yaml_path", "gone.yaml"): "--yaml_path gone.yaml does not exist",
    ("--yaml_path", "record"): "--yaml_path record is a folder",
    ("--yaml_path", "unknown.yaml"): "unknown key 'epsilon' (did you mean eps?); known keys: ",
    ("--dataset_path", "elsewhere"): "Dataset folder elsewhere/cifar10 does not exist",
    ("--index", "gone.txt"): "--index gone.txt does not exist",
    ("--index", "large.txt"): "names image 50",
    ("--epsilon", "1"): "unrecognized arguments: --epsilon 1",
    ("--epoch", "3"): "unrecognized arguments: --epoch 3 (did you mean --epochs?)",
    ("--frg", "3"): "unrecognized arguments: --frg 3",
    ("--eps",): "argument --eps: expected one argument",
    ("stray",): "unrecognized arguments: stray",
}


@pytest.mark.parametrize("damage, says", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_files_end_in_one_line_and_leave_nothing(
    damage: Callable[[Path, Edit], None], says: str, workplace: Path, run_fmp: Run, edit_record: Edit
):
    damage(workplace, edit_record)
    before = listing(workplace)
    refuses(run_fmp(*QUICK), says)
    assert listing(workplace) == before


@pytest.mark.parametrize("flags, says", BAD_FLAGS.items(), ids=[" ".join(flags) for flags in BAD_FLAGS])
def test_bad_flags_end_in_one_line_and_leave_nothing(flags: tuple[str, ...], says: str, workplace: Path, run_fmp: Run):
    (workplace / "unknown.yaml").write_text("epsilon: 1/255\n")
    (workplace / "large.txt").write_text("1\n50\n")
    before = listing(workplace)
    refuses(run_fmp(*QUICK, *flags), says)
    assert listing(workplace) == before


def test_an_index_of_one_image_is_too_little_to_fine_tune_and_leaves_nothing(workplace: Path, run_fmp: Run):
    (workplace / "one.txt").write_text("7\n")
    before = listing(workplace)
    refuses(run_fmp(*QUICK, "--frg_samples", "1", "--index", "one.txt"), "at least 2 clean images")
    assert listing(workplace) == before


def test_batches_of_one_image_are_refused(workplace: Path, run_fmp: Run):
    refuses(run_fmp(*QUICK, "--epochs", "1", "--batch_size", "1"), "'1', but must be a whole number of at least 2")


@pytest.mark.parametrize("flags", [(), ("--log", "index.txt"), ("--checkpoint_save", "index.txt/below")])
def test_a_folder_that_cannot_be_made_is_one_line(flags: tuple[str, ...], workplace: Path, run_fmp: Run):
    (workplace / "index.txt").write_text("a file")
    if not flags:
        (workplace / "record" / RECORD / "defense").write_text("a file")
    before = listing(workplace)
    remedy = f"choose another {flags[0]}" if flags else "let results go elsewhere with --save_folder"
    refuses(run_fmp(*QUICK, *flags), f"is a file; {remedy}")
    assert listing(workplace) == before


def test_images_too_small_for_an_auxiliary_head_are_refused_before_anything_is_ranked(tmp_path: Path):
    network = build_model("inception_v3", 10)
    record = SimpleNamespace(model_name="inception_v3", image_size=(96, 96, 3))
    with pytest.raises(UserError, match=r"cannot be trained on the record's \(96, 96, 3\) images .*; give --epochs 0"):
        _check_trainable(network.eval(), record)
    assert not network.training
    for name in ("googlenet", "resnet18", "vit_b_16"):
        before = build_model(name, 10)
        state = {key: value.clone() for key, value in before.state_dict().items()}
        _check_trainable(before, SimpleNamespace(model_name=name, image_size=(32, 32, 3)))
        assert all(torch.equal(value, state[key]) for key, value in before.state_dict().items())


def test_images_too_small_for_the_model_are_one_line_and_leave_nothing(
    workplace: Path, real_workplace_template: Path, run_fmp: Run, edit_record: Edit
):
    shutil.rmtree(workplace / "record")
    shutil.copytree(real_workplace_template / "record", workplace / "record")
    for part in ("train", "test"):
        for label in range(10):
            file = workplace / "data" / "toys" / part / str(label) / "a.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(file)
    edit_record(workplace / "record" / RECORD, lambda content: content.update(clean_data="toys", img_size=(8, 8, 3)))
    before = listing(workplace)
    refuses(run_fmp(*QUICK, "--ratio", "1"), "cannot take the record's (8, 8, 3) images")
    assert listing(workplace) == before
