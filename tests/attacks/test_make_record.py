"""The command that makes records: every attack, what it leaves, and a kill in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import make_record
import numpy as np
import pandas as pd
import pytest
import torch
from dataset_files import save_image
from fmp_core.attacks import make_record as making
from fmp_core.attacks.recipes import RECIPES
from fmp_core.data.attack_record import read_attack_record
from fmp_core.data.datasets import open_split
from fmp_core.errors import UserError
from fmp_core.storage.torch_file import load_torch_file
from made_records import CLASSES, TEST, TRAIN, flags, make
from PIL import Image

T5 = ["clean_test_loss_avg_over_batch", "bd_test_loss_avg_over_batch", "test_acc", "test_asr", "test_ra"]
BADNET_COLUMNS = [
    "epoch", "batch", "train_epoch_loss_avg_over_batch", "train_acc", "train_acc_clean_only", "train_asr_bd_only",
    "train_ra_bd_only", *T5,
]  # fmt: skip


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_torch_file(folder / "attack_result.pt")["model"]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("attack", ["badnet", "blended", "lf", "wanet", "ssba"])
def test_every_attack_leaves_a_record_we_read(attack: str, data: Path, tmp_path: Path) -> None:
    folder = make(data, tmp_path, "--attack", attack, "--pratio", "0.25", "--attack_target", "1")
    record = read_attack_record(folder)
    assert (record.dataset, record.num_classes, record.model_name) == ("toys", CLASSES, "squeezenet1_0")
    test_set = open_split(data, "toys", False, (32, 32, 3))
    assert record.bd_test.targets.tolist() == [1] * 6 and 1 not in record.bd_test.true_labels(test_set)
    assert not torch.equal(record.bd_test.pixels((32, 32, 3)), test_set.read(record.bd_test.indices.tolist()))  # type: ignore
    info = torch.load(folder / "info.pickle", weights_only=True)
    assert info["attack"] == {"lf": "lowFrequency", "ssba": "ssba_like"}.get(attack, attack)
    assert (info["img_size"], info["input_width"], info["attack_target"], info["epochs"]) == ((32, 32, 3), 32, 1, 2)
    indicator = load_torch_file(folder / "train_poison_index_list.pickle")
    assert indicator.shape == (TRAIN,) and indicator.dtype == np.float64 and indicator.sum() == 6
    pictures = list((folder / "bd_train_dataset").rglob("*.png"))
    assert len(pictures) == (18 if attack == "wanet" else 6)  # wanet: twice as many noise-mode images beside them
    assert pd.read_csv(folder / "attack_df.csv", index_col=0).columns.tolist() == BADNET_COLUMNS
    assert len(list(folder.glob("*.log"))) == 1 and names(folder.parent) == {"mine"}


def test_what_lies_in_the_record_is_what_the_model_was_trained_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    real = making.train_attacked_model

    def spy(model: Any, training: Any, *more: Any) -> Any:
        seen.update(training._asdict())
        return real(model, training, *more)

    monkeypatch.setattr(making, "train_attacked_model", spy)
    folder = make(data, tmp_path, "--attack", "wanet", "--attack_label_trans", "all2all", "--pratio", "0.25", "--epochs", "1")
    stored = load_torch_file(folder / "attack_result.pt")["bd_train"]
    clean = open_split(data, "toys", True, (32, 32, 3))
    images, labels = clean.read(range(TRAIN)), clean.labels.clone()
    for index, item in stored["bd_data_container"]["data_dict"].items():
        file = folder / Path(item["path"]).relative_to("record/mine")
        images[index] = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
        labels[index], original = item["other_info"]
        assert original == clean.labels[index]
    assert torch.equal(seen["images"], images) and torch.equal(seen["labels"], labels)
    assert int(seen["poisoned"].sum()) == 6 and int((labels != clean.labels).sum()) == 6
    assert len(read_attack_record(folder).bd_test) == TEST  # all2all tests every image


def test_training_accuracies_are_told_apart(data: Path, tmp_path: Path) -> None:
    table = pd.read_csv(make(data, tmp_path, "--pratio", "0.25") / "attack_df.csv", index_col=0)
    mixed = (18 * table["train_acc_clean_only"] + 6 * table["train_asr_bd_only"]) / 24
    np.testing.assert_allclose(table["train_acc"], mixed, rtol=1e-9)


def test_a_control_carries_a_trigger_its_model_never_saw(data: Path, tmp_path: Path) -> None:
    folder = make(data, tmp_path, "--pratio", "0")
    record = read_attack_record(folder)
    assert (record.bd_test.pixels((32, 32, 3))[:, :, -3:, -3:] == 255).all() and len(record.bd_test) == 6
    clean = torch.load(folder / "clean_model.pth", weights_only=True)
    assert all(torch.equal(value, clean[key]) for key, value in state(folder).items())
    assert load_torch_file(folder / "train_poison_index_list.pickle").sum() == 0
    assert not (folder / "bd_train_dataset").exists()
    expected = [name for name in BADNET_COLUMNS if not name.endswith("_bd_only")]
    assert pd.read_csv(folder / "attack_df.csv", index_col=0).columns.tolist() == expected


def test_no_attack_leaves_what_backdoorbenchs_prototype_leaves(data: Path, tmp_path: Path) -> None:
    folder = make(data, tmp_path, "--attack", "none")
    assert {name for name in names(folder) if not name.endswith(".log")} == {"attack_df.csv", "clean_model.pth", "info.pickle"}
    table = pd.read_csv(folder / "attack_df.csv", index_col=0)
    assert table.columns.tolist() == [
        "epoch", "batch", "test_correct", "test_loss_sum_over_batch", "test_total", "test_loss_avg_over_batch", "test_acc",
    ]  # fmt: skip
    np.testing.assert_allclose(table["test_acc"], table["test_correct"] / TEST)
    control = make(data, tmp_path / "control", "--pratio", "0")  # the same training, bit by bit
    clean = torch.load(folder / "clean_model.pth", weights_only=True)
    assert all(torch.equal(value, clean[key]) for key, value in state(control).items())
    info = load_torch_file(folder / "info.pickle")
    assert info["attack"] == "none" and not {"pratio", "attack_target", "patch_size"} & set(info)


# The command, but its process is killed with SIGKILL in the middle of the second epoch (5th batch; an epoch has 3).
SUICIDE = """
import os, signal, sys
import make_record
from fmp_core.attacks import train_model
from fmp_core.system.progress import Progress

class Deadly(Progress):
    def add(self, amount=1):
        super().add(amount)
        if self.done == 5:
            os.kill(os.getpid(), signal.SIGKILL)

train_model.Progress = Deadly
make_record.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(data: Path, tmp_path: Path) -> None:
    more = ["--save_folder_name", "mine", "--epochs", "3"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SUICIDE, *flags(data, tmp_path, *more)]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    saved = tmp_path / "record" / ".mine.unfinished" / "training.pt"
    assert load_torch_file(saved)["state"]["finished"] == 1 and not (tmp_path / "record" / "mine").exists()
    (saved.parent / ".training.abc.pt").touch()  # what a kill during a save leaves
    folder = make(data, tmp_path, *more)
    whole = make(data, tmp_path / "whole", *more)
    assert all(torch.equal(value, state(whole)[key]) for key, value in state(folder).items())
    assert (folder / "attack_df.csv").read_text() == (whole / "attack_df.csv").read_text()
    assert "going on after epoch 1 of 3" in "".join(path.read_text() for path in folder.glob("*.log"))
    without_log = [{name for name in names(place) if not name.endswith(".log")} for place in (folder, whole)]
    assert without_log[0] == without_log[1]


def test_an_unfinished_record_of_other_settings_is_not_overwritten(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(making, "write_record", stop)
        assert make_record.main(flags(data, tmp_path, "--save_folder_name", "mine")) == 130
    assert "Run the same command again" in capsys.readouterr().err
    assert make_record.main(flags(data, tmp_path, "--save_folder_name", "mine", "--lr", "0.5", "--quiet")) == 2
    error = capsys.readouterr().err
    assert "lr 0.01 (now 0.5)" in error and error.count("\n") == 1
    make(data, tmp_path, "--lr", "0.002", "--fresh")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--attack", "sig", "--pratio", "0.5"], "at most 0.3333 is possible"),
        (["--pratio", "lots"], "--pratio is 'lots', but must be a number"),
        (["--epochs", "0"], "--epochs is 0"),
        (["--batch_size", "1"], "--batch_size is '1', but must be"),
        (["--lr", "-1"], "--lr is '-1', but must be"),
        (["--model", "resnet19"], "resnet19"),
        (["--model", "alexnet"], "Model alexnet cannot be trained on toys, whose images are 32x32x3"),
        (["--model", "googlenet"], "Model googlenet has several outputs in training"),
        (["--dataset", "mnist"], "cannot be trained on mnist, whose images are 28x28x1"),
        (["--limit_train", "25"], "--limit_train is 25, but toys has 24 training images"),
        (["--attack", "lf", "--trigger_file", "gone.npy"], "--trigger_file gone.npy does not exist"),
        (["--dataset", "gone"], "gone does not exist"),
        (["--dataset", "elsewhere/gone"], "Dataset folder elsewhere/gone does not exist"),
        (["--dataset", ".."], "--dataset .. is no name that a record can hold"),
        (["--dataset", "gtsrb"], "Dataset gtsrb must have images labelled 0..42, but has 1 images labelled 43..43"),
        (["--attack", "lf", "--trigger_file", "several.npy"], "several.npy cannot be read as a .npy array (it holds several)"),
        (["--device", "tpu"], "--device is 'tpu', but must be auto, cpu"),
        (["--unknown", "1"], "unrecognized arguments"),
        (["--model", "preactresnet18", "--lr", "1e30", "--epochs", "2"], "Training diverged"),
    ],
)
def test_bad_flags_are_one_sentence(
    more: list[str], says: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(data)
    try:
        code = make_record.main(flags(data, tmp_path, "--quiet", *more))
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("make_record: ") and error.count("\n") == 1
    assert not [name for name in (tmp_path / "record").glob("*") if not name.name.startswith(".")]


def test_a_model_that_cannot_be_trained_is_refused_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    nowhere = ["--dataset_path", str(tmp_path / "gone"), "--record_root", str(tmp_path / "record")]
    for dataset, model in (("mnist", "resnet18"), ("cifar10", "alexnet"), ("tiny", "inception_v3")):
        assert make_record.main(["--dataset", dataset, "--model", model, *nowhere]) == 2
        assert f"Model {model} " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert "mnist" not in RECIPES


@pytest.mark.parametrize(
    "named", [["--dataset", "GTSRB", "--dataset_path", "."], ["--dataset", "./GTSRB"]], ids=["name", "path"]
)
def test_a_dataset_may_be_named_as_its_archive_is_or_by_its_path(
    named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        for label in range(43):
            save_image(tmp_path / "GTSRB" / split / f"{label:05d}" / "a.png", label)
    words = [*named, "--device", "cpu", "--quiet", "--model", "squeezenet1_0", "--epochs", "1", "--amp", "False"]
    assert make_record.main([*words, "--lr", "0.001"]) == 0
    record = tmp_path / "record" / "badnet_gtsrb"
    assert load_torch_file(record / "info.pickle")["dataset"] == "gtsrb"
    assert load_torch_file(record / "attack_result.pt")["clean_data"] == read_attack_record(record).dataset == "gtsrb"


def test_a_path_is_not_read_from_a_folder_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A record calls both gtsrb, and the folder of just that name would win."""
    for name in ("GTSRB", "gtsrb"):
        (tmp_path / name).mkdir()
    assert make_record.main(["--dataset", str(tmp_path / "GTSRB"), "--record_root", str(tmp_path / "record")]) == 2
    error = capsys.readouterr().err
    assert f"--dataset {tmp_path}/GTSRB would be read from {tmp_path}/gtsrb, which has the same name; move one" in error
    assert not (tmp_path / "record").exists()


def test_a_record_that_appeared_meanwhile_is_not_made_again(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = making.make_plan

    def slowly(*about: Any) -> making.Plan:
        made = plan(*about)
        made.folder.mkdir(parents=True)  # by another process, while this one reads its dataset
        return made

    monkeypatch.setattr(making, "make_plan", slowly)
    assert make_record.main(flags(data, tmp_path, "--save_folder_name", "mine")) == 2
    assert "mine exists already" in capsys.readouterr().err and names(tmp_path / "record") == {"mine"}
    (tmp_path / "record" / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="link exists already"):
        making._refuse_existing(tmp_path / "record" / "link")


def test_a_limited_record_numbers_its_images_as_the_whole_dataset(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []
    real = making.train_attacked_model
    monkeypatch.setattr(
        making, "train_attacked_model", lambda model, on, *more: (trained.append(on), real(model, on, *more))[1]
    )
    more = ["--limit_train", "12", "--attack", "wanet", "--pratio", "0.25", "--epochs", "1"]
    folder = make(data, tmp_path, *more)
    indicator = load_torch_file(folder / "train_poison_index_list.pickle")
    assert indicator.shape == (TRAIN,) and indicator.sum() == 3  # 0.25 of the 12, of all 24 positions
    stored = load_torch_file(folder / "attack_result.pt")["bd_train"]
    assert len(stored["original_index_array"]) == len(stored["poison_indicator"]) == TRAIN
    assert len(stored["bd_data_container"]["data_dict"]) == 9  # and 6 noise-mode images
    assert len(trained[0].images) == 12 and int(trained[0].poisoned.sum()) == 3 and int(trained[0].cross.sum()) == 6
    clean = open_split(data, "toys", True, (32, 32, 3)).read(range(TRAIN))
    plain = trained[0].images[~(trained[0].poisoned | trained[0].cross)]
    assert all((image == clean).flatten(1).all(1).any() for image in plain)


def test_help_names_backdoorbenchs_training_and_loads_no_torch() -> None:
    code = "import sys, make_record\ntry: make_record.main(['-h'])\nfinally: assert not {'torch', 'pandas'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "BB: 100 epochs, lr 0.01" in ran.stdout and "mnist" not in ran.stdout
