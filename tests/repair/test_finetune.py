"""Fine-tuning: each part of ``strong`` takes part in it, pruned maps stay zero, and images move as the dataset's do."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from fmp_core.data.datasets import DatasetFacts
from fmp_core.errors import UserError
from fmp_core.inputs import DefenderInputs
from fmp_core.inversion.trigger import ALL_TO_ALL, InvertedTrigger
from fmp_core.inversion.verdict import Verdict
from fmp_core.models.feature_maps import ConvLayer, trace_conv_layers
from fmp_core.models.pruning import prune_feature_maps
from fmp_core.models.training import Trainer
from fmp_core.repair.finetune import FineTuning
from fmp_core.selection.choice import Selection, select_at_random
from fmp_core.selection.select import select_feature_maps
from fmp_core.settings import Settings, load_settings
from fmp_core.system.cli import Stages
from fmp_core.system.devices import Device
from planted import BAD, CLASSES, TARGET, WHITE, Planted, images_of
from torch import Tensor
from toy import SmallPreActResNet
from toy_cases import same, toy_case, weights

CPU = Device(torch.device("cpu"))
STILL = DatasetFacts(5, (8, 8, 3), crop_padding=0)
MOVING = DatasetFacts(5, (8, 8, 3), flip=True, crop_padding=2)
NOTHING = Selection(torch.zeros(36, dtype=torch.bool))  # of the maps of the toy network


def corner(size: int, side: int, target: int = TARGET) -> InvertedTrigger:
    """A white patch in the last corner."""
    where = torch.zeros(1, 1, size, size, dtype=torch.bool)
    where[..., -side:, -side:] = True
    return InvertedTrigger("sparse", target, torch.ones(1, 3, size, size), where)


def verdict_on(classes: int, target: int) -> Verdict:
    return Verdict("sparse", torch.eye(classes + 1, dtype=torch.float64)[target], 100)


def attacked(facts: DatasetFacts = STILL) -> DefenderInputs:
    """A toy network and 16 images, always the same."""
    model, images, labels = toy_case(SmallPreActResNet, count=16)
    layers = trace_conv_layers(model.network, images[:1])
    return DefenderInputs(model, layers, (images * 255).round().to(torch.uint8), labels, 5, facts)  # type: ignore[arg-type]


def selected(defender: DefenderInputs, target: int = TARGET) -> Selection:
    """A quarter of the maps, of a model that the verdict calls backdoored."""
    drawn = select_at_random(defender.layers, 4, "layer", 0)
    return replace(drawn, verdict=verdict_on(defender.num_classes, target), triggers=(corner(8, 2, target),))


def strong(**changes: Any) -> Settings:
    few = {"preset": "strong", "epochs": 1, "batch_size": 4, "amp": False, "dtype": "fp32"}
    return load_settings({**few, **changes})


def tuned(defender: DefenderInputs, selection: Selection, settings: Settings, folder: Path) -> dict[str, Tensor]:
    """The weights of the pruned and fine-tuned model."""
    fine_tuning = FineTuning.prepare(defender, selection, settings, CPU, folder)
    prune_feature_maps(defender.layers, selection.by_layer(defender.layers))
    assert [epoch.number for epoch in fine_tuning.run()] == [*range(1, settings.epochs + 1)]
    fine_tuning.forget()
    return weights(defender.model)


def test_each_part_of_strong_changes_the_final_weights(tmp_path: Path) -> None:
    left_out: tuple[dict[str, Any], ...] = ({}, {"unlearn": 0.0}, {"distill": 0.0}, {"interpolate": 0.0}, {"masked": False})
    found = []
    for changes in left_out:
        defender = attacked()
        found.append((changes, tuned(defender, selected(defender), strong(**changes), tmp_path)))
    for (one, its), (other, others) in combinations(found, 2):
        assert not same(its, others), (one, other)


def planted() -> DefenderInputs:
    """A model whose backdoor is a white patch in the last corner, and images that it classifies."""
    images, labels = images_of()
    model, facts = Planted(WHITE).eval(), DatasetFacts(CLASSES, (16, 16, 3), crop_padding=0)
    return DefenderInputs(model, [ConvLayer("conv", model.conv)], images, labels, CLASSES, facts)  # type: ignore[arg-type]


@torch.no_grad()
def share_sent_to_target(defender: DefenderInputs) -> float:
    """Of the images of other classes, with the patch. Without it, nearly all images still get their own classes."""
    clean = defender.images / 255
    assert (defender.model(clean).argmax(1) == defender.labels).double().mean() > 0.95
    triggered = defender.model(corner(16, 4).apply(clean[defender.labels != TARGET]))
    return float((triggered.argmax(1) == TARGET).double().mean())


def test_strong_removes_a_planted_backdoor(tmp_path: Path) -> None:
    """From the search for triggers to the last of two epochs."""
    defender, settings = planted(), strong(epochs=2, batch_size=40, lr=0.001)
    assert share_sent_to_target(defender) > 0.95
    selection = select_feature_maps(defender, settings, tmp_path, Stages())
    assert selection.target == TARGET and selection.mask.nonzero().flatten().tolist() == [BAD]
    tuned(defender, selection, settings, tmp_path)
    assert share_sent_to_target(defender) < 0.05


@pytest.mark.parametrize(("unlearn", "stays"), [(0.0, True), (0.5, False)])
def test_unlearning_takes_a_backdoor_that_pruning_left(unlearn: float, stays: bool, tmp_path: Path) -> None:
    """No map is pruned, and clean images alone do not disturb the planted one."""
    defender, parts = planted(), {"unlearn": unlearn, "distill": 0.0, "interpolate": 0.0}
    nothing = torch.zeros(8, dtype=torch.bool)
    selection = Selection(nothing, verdict=verdict_on(CLASSES, TARGET), triggers=(corner(16, 4),))
    tuned(defender, selection, strong(batch_size=40, lr=0.001, **parts), tmp_path)
    share = share_sent_to_target(defender)
    assert share > 0.95 if stays else share < 0.05


@pytest.mark.parametrize(("target", "named"), [(TARGET, TARGET), (ALL_TO_ALL, None)])
def test_the_teacher_leaves_out_the_verdicts_target(target: int, named: int | None, tmp_path: Path) -> None:
    defender = attacked()
    selection = selected(defender, target)
    made = FineTuning.prepare(defender, selection, strong(distill=2.0, interpolate=0.4, random_seed=3), CPU, tmp_path)
    assert made.teacher.target == named and made.teacher.weight == 2 and made.interpolation.share == 0.4
    assert made.unlearning.triggers == selection.triggers and made.unlearning.search.seed == 3


@pytest.mark.parametrize("masked", [True, False])
def test_pruned_maps_stay_zero_in_every_epoch_if_masked(masked: bool, tmp_path: Path) -> None:
    """They would come back where a residual sum follows; that they do without masks shows it."""
    defender = attacked()
    selection = selected(defender)
    chosen = selection.by_layer(defender.layers)
    fine_tuning = FineTuning.prepare(
        defender, selection, strong(epochs=3, unlearn=0.0, interpolate=0.0, masked=masked), CPU, tmp_path
    )
    prune_feature_maps(defender.layers, chosen)
    zero = []
    for _ in fine_tuning.run():
        zero.append(not any(layer.module.weight[chosen[layer.name]].any() for layer in defender.layers))
    assert selection.pruned == 9 and zero == [masked] * 3


def test_other_pruned_maps_than_at_a_kill_are_named(tmp_path: Path) -> None:
    """As another processor selects them. No setting that could be given again differs."""
    for first in (0, 1):
        defender, mask = attacked(), torch.zeros(36, dtype=torch.bool)
        mask[first] = True
        selection = Selection(mask)
        fine_tuning = FineTuning.prepare(defender, selection, Settings(epochs=3, batch_size=4, amp=False), CPU, tmp_path)
        prune_feature_maps(defender.layers, selection.by_layer(defender.layers))
        epochs = fine_tuning.run()
        if first:
            with pytest.raises(
                UserError, match=r"was made with pruned feature maps \(another .* others\) 1, \w+ \(now 1, \w+\)"
            ):
                next(epochs)
        else:
            assert [next(epochs).number, next(epochs).number] == [1, 2]  # the first is saved as the second is asked for
            epochs.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "other", "says"),
    [
        ("training_precision", torch.bfloat16, r"precision of training torch\.float32 \(now torch\.bfloat16\)"),
        ("choose_dtype", torch.bfloat16, r"precision of trigger inversion torch\.float32 \(now torch\.bfloat16\)"),
        ("device", Device(torch.device("cpu"), (0, 1)), "digest of model"),
    ],
    ids=["training", "inversion", "GPUs"],
)
def test_a_run_does_not_go_on_in_another_precision_or_on_another_number_of_gpus(
    name: str, other: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another node of a cluster. No setting that could be given again differs."""
    settings = Settings(epochs=3, batch_size=4, amp=False, dtype="fp32")
    epochs = FineTuning.prepare(attacked(), NOTHING, settings, CPU, tmp_path).run()
    assert [next(epochs).number, next(epochs).number] == [1, 2]
    epochs.close()  # type: ignore[attr-defined]
    again = FineTuning.prepare(attacked(), NOTHING, settings, CPU, tmp_path)
    if name == "device":
        again = replace(again, device=other)
    else:
        monkeypatch.setattr(f"fmp_core.repair.finetune.{name}", lambda *_: other)
    with pytest.raises(UserError, match=says):
        next(again.run())


def test_images_move_as_those_of_the_dataset(tmp_path: Path) -> None:
    settings = Settings(epochs=2, batch_size=4, amp=False)
    found = {}
    for facts in (STILL, replace(MOVING, flip=False), MOVING):
        defender = attacked(facts)
        found[facts] = tuned(defender, NOTHING, settings, tmp_path)
    for one, other in combinations(found, 2):
        assert not same(found[one], found[other]), (one, other)
    plain = attacked()
    assert len(list(Trainer(settings, CPU, MOVING).epochs(plain.model, plain.images, plain.labels))) == 2
    assert same(found[MOVING], weights(plain.model))


def test_only_the_last_epochs_model_is_averaged(tmp_path: Path) -> None:
    start, found = weights(attacked().model), []
    for share in (0.0, 0.5):
        found.append(tuned(attacked(), NOTHING, Settings(epochs=2, batch_size=4, amp=False, interpolate=share), tmp_path))
    plain, averaged = found
    floats = [name for name, value in plain.items() if value.is_floating_point()]
    assert all(torch.equal(averaged[name], plain[name].lerp(start[name], 0.5)) for name in floats)


def test_every_nth_epoch_is_tested_and_saved(tmp_path: Path) -> None:
    settings = Settings(epochs=5, batch_size=4, amp=False, frequency_test=2, frequency_save=3)
    epochs = list(FineTuning.prepare(attacked(), NOTHING, settings, CPU, tmp_path).run())
    assert [epoch.number for epoch in epochs if epoch.to_test] == [2, 4, 5]
    assert [epoch.number for epoch in epochs if epoch.to_save] == [3]


CHANGES = {
    "inverted triggers": lambda defender, chosen: (defender, replace(chosen, triggers=(corner(8, 2, TARGET + 1),))),
    "inverted triggers sparse": lambda defender, chosen: (defender, replace(chosen, triggers=())),
    "pruned feature maps": lambda defender, chosen: (defender, replace(chosen, mask=~chosen.mask)),
    "digest of model": lambda defender, chosen: (replace(defender, facts=MOVING), chosen),
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_interrupted_run_goes_on_only_as_what_it_was(what: str, tmp_path: Path) -> None:
    """Of another target or triggers, other maps or other augmentation the epochs to come would not be the same training."""
    defender, settings = attacked(), strong(epochs=2)
    chosen = selected(defender)
    epochs = FineTuning.prepare(defender, chosen, settings, CPU, tmp_path).run()
    assert [next(epochs).number, next(epochs).number] == [1, 2]  # the state after the first is saved before the second
    del epochs
    fresh = attacked()
    assert next(FineTuning.prepare(fresh, chosen, settings, CPU, tmp_path).run()).restored
    with pytest.raises(UserError, match=f"was made with {what}"):
        next(FineTuning.prepare(*CHANGES[what](fresh, chosen), settings, CPU, tmp_path).run())
