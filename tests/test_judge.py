"""Judging a model without an attack record and without triggered images, and repairing it."""

from __future__ import annotations

import json
from pathlib import Path

import judge_model
import pytest
import torch
from colours import CLASSES, FLAGS, NAME, SIZE, coloured, save_split
from fmp_core import judge
from fmp_core.command import main as fmp_main
from fmp_core.data.attack_record import read_attack_record
from fmp_core.data.datasets import DatasetFacts
from fmp_core.errors import UserError
from fmp_core.inversion import trigger, verdict
from fmp_core.inversion.trigger import ALL_TO_ALL
from fmp_core.inversion.verdict import Verdict
from fmp_core.models.build import PixelModel, build_model
from fmp_core.models.training import Trainer
from fmp_core.results.collect import collect
from fmp_core.settings import Settings
from fmp_core.system.devices import Device
from narrow_resnet import NARROW_RESNET

CPU = Device(torch.device("cpu"))


@pytest.fixture
def place(colours: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with ``model.pth`` and ``data/colours``."""
    torch.save(read_attack_record(colours / "record" / NAME).state, colours / "model.pth")
    monkeypatch.chdir(colours)
    return colours


def run(*flags: str, model: str = "model.pth") -> int:
    size = ["--image_size", str(SIZE), "--device", "cpu", "--dtype", "fp32"]
    return judge_model.main([model, "--model", NARROW_RESNET, "--dataset", "data/colours", *size, *flags])


def test_a_model_is_judged_and_its_record_can_be_defended(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run() == 0
    out = capsys.readouterr().out
    assert "Accuracy on clean test images: " in out and "No verdict: " in out and "too few" in out
    record = read_attack_record(place / "record" / "model")
    assert len(record.bd_test) == 0 and record.image_size == (SIZE, SIZE, 3) and record.num_classes == CLASSES
    monkeypatch.setattr(verdict, "LEAST_HELD_OUT", 1)
    for name, fewer in (("STEPS", 3), ("SPARSE_BATCH", 8), ("DENSE_BATCH", 8)):
        monkeypatch.setattr(trigger, name, fewer)
    assert run() == 0  # again: the record is there
    assert "ackdoored" in capsys.readouterr().out

    assert fmp_main(["--result_file", "model", "--device", "cpu", *FLAGS, "--report", "True"]) == 0
    captured = capsys.readouterr()
    assert "after FMP " in captured.out and "DER" not in captured.out and "ASR -" in captured.err
    results = place / "record" / "model" / "defense" / "fmp"
    found = json.loads((results / "metrics.json").read_text())
    assert found["after"]["test_asr"] is found["after"]["test_ra"] is found["der"] is None
    assert 0 < found["after"]["test_acc"] <= 1 and found["removal"] == {"outcome": "not tested", "certain": True}
    page = (results / "report.html").read_text()
    assert "No triggered image is known" in page and "DER" not in page and "Triggered images, before" not in page
    rows = collect(place / "record", pytest.fail).set_index("defense")
    assert rows.loc["fmp", "test_acc"] == found["after"]["test_acc"] and rows.loc["fmp", ["test_asr", "der"]].isna().all()


def test_a_wrong_normalisation_is_noticed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = coloured(32, seed=1)
    facts = DatasetFacts(CLASSES, (SIZE, SIZE, 3), (0.9, 0.1, 0.1), (0.1, 0.9, 0.9), crop_padding=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_model(NARROW_RESNET, CLASSES)
    settings = Settings(epochs=12, batch_size=8, lr=0.005, amp=False)
    list(Trainer(settings, CPU, facts).epochs(PixelModel(network, facts), images, labels))
    torch.save({"epoch": 3, "state_dict": network.state_dict()}, "other.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(judge.USUAL, "unusual", (facts.mean, facts.std))
        assert run(model="other.pth") == 2
        said = capsys.readouterr().err
        assert "normalised otherwise (unusual); give --mean 0.9,0.1,0.1 --std 0.1,0.9,0.9" in said
        assert run("--mean", "0.9,0.1,0.1", "--std", "0.1,0.9,0.9", model="other.pth") == 0


def test_bad_input_is_one_sentence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"epoch": 3}, "nothing.pth")
    state = torch.load("model.pth", weights_only=True)
    torch.save({key: value + 1 for key, value in state.items()}, "changed.pth")
    for flags, model, said in (
        ((), "absent.pth", "absent.pth does not exist"),
        ((), "nothing.pth", "holds no weights that could be read"),
        (("--model", "resnet18"), "model.pth", "model lacks the weights"),
        (("--dataset", "nowhere"), "model.pth", "nowhere does not exist"),
        (("--save_folder_name", NAME), "changed.pth", "is the record of another model"),
        (("--mean", "0.5"), "model.pth", "--std"),
    ):
        assert run(*flags, model=model) == 2
        err = capsys.readouterr().err
        assert said in err and len(err.strip().splitlines()) == 1, err
    assert judge_model.main(["model.pth"]) == 2
    assert "--dataset is missing" in capsys.readouterr().err


def test_no_other_image_is_needed(place: Path) -> None:
    """The clean images may be a folder that BackdoorBench does not know, of another size than the model's."""
    images, labels = coloured(16, seed=3)
    large = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for split in ("train", "test"):
        save_split(place / "data" / "large" / split, large, labels)
    assert run("--dataset", "data/large", "--save_folder_name", "large") == 0


def test_the_verdict_in_words() -> None:
    def rates(*values: float) -> Verdict:
        return Verdict("sparse", torch.tensor(values, dtype=torch.float64), 200)

    assert judge.in_words(rates(0.1, 0.9, 0.2, 0.3)) == [
        "Judged backdoored, target class 1: an inverted trigger (sparse) flips 90 % of clean images to class 1, 70 points more "
        "than the runner-up."
    ]
    assert rates(0.1, 0.2, 0.2, 0.9).target == ALL_TO_ALL
    assert judge.in_words(rates(0.1, 0.2, 0.2, 0.9))[0].startswith("Judged backdoored, all-to-all: ")
    assert judge.in_words(rates(0.1, 0.2, 0.3, 0.1))[0].startswith("Not shown to be backdoored, which does not mean clean: ")


def test_nothing_but_weights_is_read_from_a_model_file(place: Path) -> None:
    torch.save(build_model(NARROW_RESNET, CLASSES), "whole.pth")
    with pytest.raises(UserError, match=r"whole\.pth"):
        judge.weights_in(Path("whole.pth"))
