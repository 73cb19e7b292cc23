"""Defaults < YAML < flags; every mistake names its key and where it stands."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from fmp_core.errors import UserError
from fmp_core.fields import parse_value
from fmp_core.settings import (
    FIELDS,
    PROJECT,
    Settings,
    add_arguments,
    find_config,
    groups,
    load_settings,
)
from hypothesis import given
from hypothesis import strategies as st

SHIPPED = sorted((PROJECT / "config" / "defense" / "fmp").glob("*.yaml"))
IMPOSSIBLE = [
    *(("eps", text) for text in ("0", "-1/255", "1/0", "1/", "nan", "inf", "1.5", "small")),
    ("eps", True),
    ("alpha", "0"),
    ("ratio", "1.5"),
    ("ratio", "0"),
    ("ratio", "-0.1"),
    ("ratio", float("nan")),
    ("p", "0"),
    ("p", "2.5"),
    ("p", True),
    ("p", "1e400"),
    ("frg_steps", "0"),
    ("frg_samples", "0"),
    ("frg_samples", "some"),
    ("scope", "both"),
    ("ranking", "fast"),
    ("dtype", "fp16"),
    ("chunk", "0"),
    ("memory", "1"),
    ("fresh", "maybe"),
    ("epochs", "-1"),
    ("epochs", "ten"),
    ("batch_size", "0"),
    ("lr", "0"),
    ("lr", "1e999"),
    ("lr_scheduler", "cosine"),
    ("steplr_milestones", "5,x"),
    ("steplr_milestones", "0"),
    ("client_optimizer", "adam"),
    ("sgd_momentum", "1.1"),
    ("wd", "-1"),
    ("amp", "ture"),
    ("pin_memory", "2"),
    ("frequency_test", "-1"),
    ("frequency_save", "0.5"),
    ("num_classes", "1"),
    ("random_seed", "-1"),
    ("random_seed", str(2**64)),  # more than torch takes
    ("dataset", ""),
    ("mean", "0.5,0.5"),
    ("mean", "127"),
    ("std", "0,1,1"),
    ("std", ""),
    ("test_images", "0"),
    ("log_level", "all"),
    ("device", ["cuda"]),
    ("index", 7),
]


def settings_file(folder: Path, **content: Any) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def parsed(*flags: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return vars(parser.parse_args(flags))


def test_defaults_are_the_papers():
    settings = load_settings({})
    assert (settings.p, settings.eps, settings.frg_steps, settings.ratio) == (64, 1 / 255, 1, 0.1)
    assert (settings.epochs, settings.batch_size, settings.lr, settings.sgd_momentum) == (10, 256, 0.01, 0.9)
    assert settings.lr_scheduler == "CosineAnnealingLR"


def test_yaml_beats_defaults_and_flags_beat_yaml(tmp_path: Path):
    path = settings_file(tmp_path, p=8, epochs=3)
    settings = load_settings(parsed("--yaml_path", path, "--epochs", "5"))
    assert (settings.p, settings.epochs, settings.lr) == (8, 5, 0.01)
    path = settings_file(tmp_path, preset="strong", lr=0.05)
    assert (load_settings({"yaml_path": path}).lr, load_settings({"yaml_path": path, "preset": "strong"}).lr) == (0.05, 0.02)


def test_a_flag_that_is_not_given_leaves_the_yaml_value(tmp_path: Path):
    settings = load_settings(parsed("--yaml_path", settings_file(tmp_path, amp=False, pin_memory=False, frequency_test=4)))
    assert (settings.amp, settings.pin_memory, settings.frequency_test) == (False, False, 4)


def test_blank_yaml_values_and_an_empty_file_mean_the_default(tmp_path: Path):
    path = tmp_path / "blank.yaml"
    path.write_text("p:\nlog:\n")
    assert load_settings({"yaml_path": str(path)}) == Settings()
    path.write_text("# nothing\n")
    assert load_settings({"yaml_path": str(path)}) == Settings()


def test_config_yaml_states_the_defaults():
    content = yaml.safe_load((PROJECT / "config/defense/fmp/config.yaml").read_text())
    assert {"p", "eps", "frg_steps", "ratio", "epochs", "lr", "scope"} <= set(content)
    for key, value in content.items():
        stated = None if value is None else parse_value(Settings, key, value, key)
        assert stated == FIELDS[key].default, key


def test_bbs_five_settings_files_are_shipped():
    assert {"config", "cifar10", "cifar100", "gtsrb", "tiny"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_settings_load(path: Path):
    settings = load_settings({"yaml_path": str(path)})
    assert settings.dataset == (None if path.stem == "config" else path.stem)


@pytest.mark.parametrize("text", ["1/255", "0.00392156862745098", "3.92156862745098e-3"])
def test_eps_reads_alike_on_the_command_line_and_in_yaml(text: str, tmp_path: Path):
    flag = load_settings(parsed("--eps", text))
    file = load_settings({"yaml_path": settings_file(tmp_path, eps=text)})
    assert flag.eps == file.eps == 1 / 255


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_any_fraction_up_to_one_is_an_eps(top: int, bottom: int):
    text = f"{min(top, bottom)}/{max(top, bottom)}"
    assert load_settings({"eps": text}).eps == float(Fraction(text))


@pytest.mark.parametrize("text, value", [("True", True), ("true", True), ("1", True), ("False", False), ("0", False)])
def test_booleans_are_written_as_in_bb(text: str, value: bool):
    assert load_settings(parsed("--amp", text)).amp is value


def test_a_bare_boolean_flag_means_true(tmp_path: Path):
    path = settings_file(tmp_path, amp=False)
    settings = load_settings(parsed("--amp", "--fresh", "--yaml_path", path))
    assert (settings.amp, settings.fresh) == (True, True)


def test_milestones_are_epochs(tmp_path: Path):
    assert load_settings(parsed("--steplr_milestones", "3,7,9")).steplr_milestones == (3, 7, 9)
    assert load_settings({"yaml_path": settings_file(tmp_path, steplr_milestones=[2, 4])}).steplr_milestones == (2, 4)


def test_frg_samples_is_a_number_or_all():
    assert load_settings({"frg_samples": "all"}).frg_samples == "all"
    assert load_settings({"frg_samples": "16"}).frg_samples == 16


@pytest.mark.parametrize("key, value", IMPOSSIBLE)
def test_an_impossible_value_is_refused_by_flag_or_by_key_and_file(key: str, value: Any, tmp_path: Path):
    with pytest.raises(UserError) as caught:
        load_settings({key: value})
    assert f"--{key} is {value!r}, but must be " in str(caught.value)
    path = settings_file(tmp_path, **{key: value})
    with pytest.raises(UserError) as caught:
        load_settings({"yaml_path": path})
    assert f"{path}: {key} is {value!r}, but must be " in str(caught.value)


def test_an_unknown_key_is_refused_by_name(tmp_path: Path):
    path = settings_file(tmp_path, p=8, once_prune_ratio=0.1)
    with pytest.raises(UserError, match="unknown key 'once_prune_ratio'") as caught:
        load_settings({"yaml_path": path})
    assert path in str(caught.value)
    with pytest.raises(UserError, match=r"'epoch' is not a setting of FMP \(did you mean epochs\?\)"):
        load_settings({"epoch": 3})


@pytest.mark.parametrize(
    "content, says",
    [
        (b"- p\n- eps\n", "not a list"),
        (b"just words\n", "not a str"),
        (b"p: [1, 2\n", "cannot be read as YAML"),
        (b"? {a: b}\n: 1\n", "cannot be read as YAML"),
        (b"p: \xff\xfe\n", "cannot be read as YAML"),
        (b"p: !!python/object/apply:os.getcwd []\n", "cannot be read as YAML"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused_in_one_line(content: bytes, says: str, tmp_path: Path):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        load_settings({"yaml_path": str(path)})
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_current_folders_config_comes_before_the_one_beside_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = tmp_path / "config" / "defense" / "fmp"
    own.mkdir(parents=True)
    (own / "config.yaml").write_text("p: 5\n")
    monkeypatch.chdir(tmp_path)
    assert load_settings({}).p == 5
    assert find_config("./config/defense/fmp/gtsrb.yaml") == PROJECT / "config/defense/fmp/gtsrb.yaml"


def test_an_installed_package_does_without_the_default_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fmp_core.settings.PROJECT", tmp_path)
    assert load_settings({}) == Settings()


def test_a_config_in_neither_place_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no/such\.yaml") as caught:
        find_config("no/such.yaml")
    assert str(tmp_path) in str(caught.value) and str(PROJECT) in str(caught.value)


def test_flags_of_bbs_ft_are_accepted():
    flags = {
        "device": "cuda:0", "amp": "True", "checkpoint_load": "a", "checkpoint_save": "b", "log": "c", "dataset_path": "d",
        "dataset": "cifar10", "result_file": "r", "epochs": "1", "batch_size": "2", "num_workers": "4.0", "lr": "0.1",
        "lr_scheduler": "StepLR", "steplr_stepsize": "3", "steplr_gamma": "0.5", "steplr_milestones": "1,2",
        "model": "resnet18", "client_optimizer": "sgd", "sgd_momentum": "0.5", "wd": "0.1", "frequency_save": "1",
        "random_seed": "7", "yaml_path": "./config/defense/fmp/config.yaml", "ratio": "0.05", "index": "i.txt",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    settings = load_settings(parsed(*words, "-pm", "False", "-nb", "0", "-pf", "true"))
    assert (settings.pin_memory, settings.non_blocking, settings.prefetch) == (False, False, True)
    assert (settings.num_workers, settings.steplr_gamma, settings.random_seed, settings.index) == (4, 0.5, 7, "i.txt")


def test_the_yaml_of_bbs_ft_is_accepted(tmp_path: Path):
    path = tmp_path / "ft.yaml"
    path.write_text(
        "device: 'cuda'\namp: True\npin_memory: True\nnon_blocking: True\nprefetch: False\ncheckpoint_load:\n"
        "checkpoint_save:\nlog:\ndataset_path: './data'\ndataset: cifar10\nepochs: 100\nbatch_size: 256\nnum_workers: 4\n"
        "lr: 0.01\nlr_scheduler: CosineAnnealingLR\nmodel: preactresnet18\nclient_optimizer: sgd\nsgd_momentum: 0.9\n"
        "wd: 5e-4\nfrequency_save: 0\nrandom_seed: 0\nratio: 0.05\nindex:\n"
    )
    settings = load_settings({"yaml_path": str(path)})
    assert (settings.epochs, settings.wd, settings.ratio, settings.model) == (100, 5e-4, 0.05, "preactresnet18")


def test_every_setting_is_a_flag():
    flags = parsed()
    assert set(flags) == {"yaml_path", *FIELDS}
    assert all(value is None for value in flags.values())


def test_settings_do_not_change_after_they_are_read():
    change: Callable[..., None] = setattr
    with pytest.raises(dataclasses.FrozenInstanceError):
        change(Settings(), "p", 1)


def test_mean_and_std_are_one_number_or_three_and_go_together(tmp_path: Path):
    assert load_settings(parsed("--mean", "0.5", "--std", "0.25")).std == (0.25,)
    path = settings_file(tmp_path, mean=[0.4, 0.5, 0.6], std=1)
    settings = load_settings({"yaml_path": path})
    assert (settings.mean, settings.std) == ((0.4, 0.5, 0.6), (1.0,))
    with pytest.raises(UserError, match="give both"):
        load_settings({"mean": "0.5"})


def test_help_groups_flags_by_stage_and_names_their_values():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    text = " ".join(parser.format_help().split())
    for title in groups():
        assert f" {title}: " in text
    for shown in ("--eps EPS", "--save_folder FOLDER", "--scope {layer,global}", "--frg_samples {N,all}", "(default 1/255)"):
        assert shown in text


def test_the_page_of_flags_is_up_to_date():
    import write_flags

    assert (PROJECT / "docs" / "flags.md").read_text() == write_flags.page()
