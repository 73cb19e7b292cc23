"""What judge_model.py judges and advises: the images and the settings that it was given, and no others."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path

import judge_model
import pytest
import torch
from colours import coloured, save_split
from fmp_core import judge
from fmp_core.attacks.settings import RecordSettings
from fmp_core.models.build import build_model
from fmp_core.settings import FIELDS, PROJECT, Settings, add_arguments, load_settings
from judged import run
from narrow_resnet import NARROW_RESNET
from torch.nn.modules.module import register_module_forward_pre_hook


def repair(command: str) -> Settings:
    """The settings of the command that is printed."""
    words = shlex.split(command)
    assert words[0] == "python" and Path(words[1]).resolve() == PROJECT / "defense" / "fmp.py"
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return load_settings(vars(parser.parse_args(words[2:])))


def test_the_model_is_repaired_by_the_settings_that_it_was_judged_by(tmp_path: Path) -> None:
    given = {"mean": "0.5", "std": "0.25", "ratio": "0.4", "random_seed": "3", "device": "cpu", "dtype": "fp32"}
    assert {name for name in judge_model.RUN if FIELDS[name].metadata["decides"]} <= set(given)
    places = {"record_root": str(tmp_path / "my records"), "dataset_path": str(tmp_path / "data"), "result_file": "a-model"}
    settings = load_settings({**given, **places, "preset": "strong"})
    assert repair(judge._repair_command(settings)) == settings
    assert repair(judge._repair_command(settings, trainable=False)) == replace(settings, epochs=0)


def test_a_gpu_is_asked_for_the_same_kernels_each_time(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    seen: set[bool] = set()
    hook = register_module_forward_pre_hook(lambda *_: seen.add(torch.backends.cudnn.deterministic))
    assert run() == 0
    hook.remove()
    assert seen == {True} and not torch.backends.cudnn.deterministic


def test_a_share_that_is_given_is_used_and_otherwise_enough_images(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, images in (((), 32), (("--ratio", "0.5"), 16)):
        assert run(*flags) == 0
        assert f"clean     {images} training images\n" in capsys.readouterr().err


@pytest.mark.parametrize(("wanted", "images"), [(1, 3), (7, 7), (1000, 32)])
def test_so_many_images_are_taken_as_a_verdict_needs(
    wanted: int, images: int, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 32, but never less than the preset's tenth."""
    monkeypatch.setattr(judge, "ENOUGH_IMAGES", wanted)
    assert run() == 0
    assert f"clean     {images} training images\n" in capsys.readouterr().err


def test_a_model_is_tried_as_it_is_used() -> None:
    """Resnet18 makes one pixel of 32x32, of which batch norm cannot train on one image alone."""
    state = build_model("resnet18", 4).state_dict()
    judge._check_fit(Path("model.pth"), RecordSettings(model="resnet18", dataset="mine"), state, 4, (32, 32, 3))


def test_a_record_of_other_images_is_not_judged_in_their_place(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    images, labels = coloured(16, seed=3)
    for split in ("train", "test"):
        save_split(place / "data" / "other" / split, images, labels)
    capsys.readouterr()
    assert run("--dataset", "data/other") == 2
    assert f"is a record of {NARROW_RESNET} on colours with images (8, 8, 3)" in capsys.readouterr().err


def test_low_accuracy_is_pointed_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Clearly better than chance, but most images are labelled otherwise than the model says."""
    images, labels = coloured(200, seed=3)
    save_split(place / "data" / "mixed" / "train", images, labels)
    for turned, low in ((1, False), (3, True)):
        other = (torch.arange(200) % 5 < turned).long()
        save_split(place / "data" / f"mixed{turned}" / "test", images, (labels + other) % 4)
        (place / "data" / f"mixed{turned}" / "train").symlink_to(place / "data" / "mixed" / "train")
        assert run("--dataset", f"data/mixed{turned}", "--ratio", "0.1", "--save_folder_name", f"mixed{turned}") == 0
        assert ("That is low: what follows may be about how the model was given" in capsys.readouterr().out) == low


@pytest.mark.parametrize("keys", [*([key] for key in judge.WEIGHT_KEYS), ["model", "state_dict"]])
def test_weights_are_found_where_training_scripts_keep_them(keys: list[str], tmp_path: Path) -> None:
    content = {"module.w": torch.ones(2)}
    for key in reversed(keys):
        content = {"epoch": 3, "optimizer": {"lr": 0.1}, key: content}
    torch.save(content, tmp_path / "model.pth")
    found = judge.weights_in(tmp_path / "model.pth")
    assert list(found) == ["w"] and torch.equal(found["w"], torch.ones(2))
