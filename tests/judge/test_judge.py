"""Judging a model without an attack record and without triggered images, and repairing it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import judge_model
import pytest
import torch
from colours import CLASSES, FLAGS, NAME, SIZE, coloured, save_split
from fmp_core import inputs, judge
from fmp_core.command import main as fmp_main
from fmp_core.data.attack_record import read_attack_record
from fmp_core.data.datasets import DatasetFacts
from fmp_core.errors import UserError
from fmp_core.inversion import trigger, verdict
from fmp_core.inversion.verdict import in_words
from fmp_core.models.build import build_model
from fmp_core.results.collect import collect
from fmp_core.results.summary import RunSummary
from fmp_core.settings import Settings
from judged import run, trained
from narrow_resnet import NARROW_RESNET


def test_a_model_is_judged_and_its_record_can_be_defended(
    place: Path,
    weights: dict[str, torch.Tensor],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run() == 0
    out = capsys.readouterr().out
    assert "Accuracy on clean test images: 100.00 %" in out and "no verdict, since 10 held-out clean images" in out
    record = read_attack_record(place / "record" / "model")
    assert len(record.bd_test) == 0 and record.image_size == (SIZE, SIZE, 3) and record.num_classes == CLASSES
    monkeypatch.setattr(verdict, "LEAST_HELD_OUT", 1)
    for name, fewer in (("STEPS", 3), ("SPARSE_BATCH", 8), ("DENSE_BATCH", 8)):
        monkeypatch.setattr(trigger, name, fewer)
    torch.save({f"module.{key}": value for key, value in weights.items()}, "model.pth")  # the same, of DataParallel
    assert run() == 0  # again: the record is there
    out = capsys.readouterr().out
    written = json.loads((place / "record" / "model" / "verdict.json").read_text())
    assert in_words(written["verdict"]) in out and str(Path("record", "model", "verdict.json")) in out
    assert written["accuracy"] == 1 and written["model_file"] == "model.pth" and written["attack_result"] == record.digest
    assert written.keys() - {"model_file", "accuracy", "repair"} < {field.name for field in fields(RunSummary)}
    assert (written["repair"] is None) == ("To repair it" not in out) == (not written["verdict"]["backdoored"])

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
    facts = DatasetFacts(CLASSES, (SIZE, SIZE, 3), (0.9, 0.1, 0.1), (0.1, 0.9, 0.9), crop_padding=0)
    torch.save({"epoch": 3, "state_dict": trained(facts)}, "other.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(judge.USUAL_NORMALISATIONS, "unusual", (facts.mean, facts.std))
        assert run(model="other.pth") == 2
        said = capsys.readouterr().err
        assert "normalised otherwise (unusual); give --mean 0.9,0.1,0.1 --std 0.1,0.9,0.9" in said
        assert run("--mean", "0.9,0.1,0.1", "--std", "0.1,0.9,0.9", model="other.pth") == 0
        assert run("--mean", "0.1,0.9,0.9", "--std", "0.9,0.1,0.1", model="other.pth") == 2
        assert "with the --mean and --std given, and" in capsys.readouterr().err


def test_a_constant_answer_is_chance_whatever_the_classes_hold(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nine of ten test images are of one class, and the model calls all of them that, for its preprocessing is another's."""
    images, labels = coloured(400, seed=2)
    rows = torch.cat([(labels == 0).nonzero().flatten()[:90], (labels == 1).nonzero().flatten()[:10]])
    save_split(place / "data" / "skewed" / "train", images[::10], labels[::10])
    save_split(place / "data" / "skewed" / "test", images[rows], labels[rows])
    constant = {key: torch.zeros_like(value) for key, value in torch.load("model.pth").items()}
    constant[next(key for key in reversed(constant) if key.endswith("bias"))][0] = 1
    torch.save(constant, "constant.pth")
    assert run("--dataset", "data/skewed", model="constant.pth") == 2
    assert (
        "classifies 50.0 % of 100 clean test images (mean over classes) correctly, no more than chance"
        in capsys.readouterr().err
    )
    assert run("--dataset", "data/skewed") == 0
    assert "Accuracy on clean test images: 100.00 %" in capsys.readouterr().out


def test_few_test_images_are_no_proof_of_chance(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two right answers of two may be luck, but do not look like it."""
    images, labels = coloured(16, seed=2)
    save_split(place / "data" / "few" / "train", images, labels)
    save_split(place / "data" / "few" / "test", images[labels < 2][:2], labels[labels < 2][:2])
    assert run("--dataset", "data/few") == 0
    assert "Accuracy on clean test images: 100.00 %" in capsys.readouterr().out


def test_bad_input_is_one_sentence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"epoch": 3}, "nothing.pth")
    torch.save(build_model("alexnet", CLASSES), "whole.pth")
    state = torch.load("model.pth", weights_only=True)
    torch.save({key: value + 1 for key, value in state.items()}, "changed.pth")
    torch.save(build_model("alexnet", CLASSES).state_dict(), "alexnet.pth")
    images, labels = coloured(16, seed=2)
    for split in ("train", "test"):
        save_split(place / "data" / "one" / split, images[labels < 1], labels[labels < 1])
        save_split(place / "data" / "two" / split, images[labels < 2], labels[labels < 2])
        save_split(place / "data" / "turned" / split, images, (labels + 1) % CLASSES)
    for flags, model, said in (
        ((), "absent.pth", "absent.pth does not exist"),
        ((), "data", "data is a folder; name the file"),
        ((), "nothing.pth", "holds no weights that could be read"),
        ((), "whole.pth", "torch.save model.state_dict() instead"),
        (("--model", "resnet18"), "model.pth", "does not fit --model resnet18 and the 4 classes of colours"),
        (("--model", "alexnet"), "alexnet.pth", "alexnet cannot take images of 8x8x3"),
        (("--dataset", "nowhere"), "model.pth", "nowhere does not exist"),
        (("--dataset", "data/two"), "model.pth", "and the 2 classes of two"),
        (("--dataset", "data/turned"), "model.pth", "no more than chance, so a verdict would mean nothing"),
        (("--save_folder_name", NAME), "changed.pth", "is a record of another model"),
        (("--mean", "0.5"), "model.pth", "--std"),
        (("--dataset", "data/one"), "model.pth", "one has images of one class only"),
        (("--ratio", "0.001"), "model.pth", "raise --ratio"),
    ):
        assert run(*flags, model=model) == 2
        err = capsys.readouterr().err
        assert said in err.splitlines()[-1] and "Traceback" not in err, err
    assert not (place / "record" / "model").exists()  # nothing is left of what was refused
    (place / "record" / "mine").mkdir()
    (place / "record" / "mine" / "notes.txt").write_text("precious")
    assert run("--dataset", "data/turned", "--save_folder_name", "mine") == 2
    assert (place / "record" / "mine" / "notes.txt").read_text() == "precious"  # but what was there
    assert judge_model.main(["model.pth"]) == 2
    assert "--dataset is missing" in capsys.readouterr().err


def test_no_other_image_is_needed(place: Path) -> None:
    """The clean images may be a folder that BackdoorBench does not know, of another size than the model's."""
    images, labels = coloured(16, seed=3)
    large = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for split in ("train", "test"):
        save_split(place / "data" / "large" / split, large, labels)
    assert run("--dataset", "data/large", "--save_folder_name", "large") == 0


def test_nothing_but_weights_is_read_from_a_model_file(place: Path) -> None:
    torch.save(build_model(NARROW_RESNET, CLASSES), "whole.pth")
    with pytest.raises(UserError, match=r"whole\.pth"):
        judge.weights_in(Path("whole.pth"))


def test_a_record_of_another_image_size_is_not_judged_in_its_place(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    capsys.readouterr()
    assert run("--image_size", "16") == 2
    assert f"images ({SIZE}, {SIZE}, 3)" in capsys.readouterr().err


def test_images_may_be_too_small_for_training(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of 96 pixels are for the auxiliary head of inception_v3: a verdict trains nothing."""

    def too_small(*_: object) -> None:
        raise RuntimeError("Output size is too small")

    monkeypatch.setattr(inputs, "outputs_in_training", too_small)
    assert run() == 0
    loaded = inputs.load_inputs(Settings(result_file="model", epochs=0), "model", torch.device("cpu"))
    assert not inputs.can_be_trained(loaded)
    monkeypatch.undo()
    assert inputs.can_be_trained(loaded)
