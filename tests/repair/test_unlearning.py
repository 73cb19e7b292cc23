"""Images to unlearn: clean ones that carry inverted triggers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fmp_core.inversion.search import TriggerSearch
from fmp_core.repair.unlearning import Unlearning, _seed_of_epoch, with_random_triggers
from planted import TARGET, WHITE, a_trigger, images_of, trigger_search


def test_images_to_unlearn_carry_one_trigger_each():
    images, _ = images_of(60)
    triggers = [a_trigger("sparse", 1.0), a_trigger("dense-8", 8 / 255), a_trigger("warp-1", 1.0)]
    made = with_random_triggers(images, triggers, seed=0)
    expected = [(trigger.apply(images / 255) * 255).round().to(torch.uint8) for trigger in triggers]
    carries = torch.stack([(made == one).flatten(1).all(1) for one in expected])
    assert carries.any(0).all() and carries.any(1).all()
    assert torch.equal(expected[2][..., :-1, :-1], images[..., 1:, 1:])  # what lies one pixel to the right and down
    assert torch.equal(made, with_random_triggers(images, triggers, seed=0))
    assert not torch.equal(made, with_random_triggers(images, triggers, seed=1))


def test_no_epoch_of_a_seed_draws_what_an_epoch_of_another_does():
    drawn = {_seed_of_epoch(seed, epoch) for seed in range(5) for epoch in range(20)}
    assert len(drawn) == 100 and max(drawn) < 2**63


def test_triggers_of_the_model_as_it_is_come_in_from_the_second_epoch_on():
    """The attacked model's trigger is a dark corner that does nothing here; the current model's is the planted white patch."""
    search = trigger_search(WHITE)
    old = replace(a_trigger("sparse", 0.0), target=TARGET)
    unlearning = Unlearning(search, [old])
    carry_old = (old.apply(search.images / 255) * 255).round().to(torch.uint8)
    first, second, third = (unlearning.substitutes(epoch) for epoch in range(3))
    assert torch.equal(first, carry_old)
    for made in (second, third):
        of_old = (made == carry_old).flatten(1).all(1)
        assert 0.3 < of_old.double().mean() < 0.7
        with torch.no_grad():
            flipped = search.model(made / 255).argmax(1) == TARGET
        assert flipped[~of_old].double().mean() > 0.9 and flipped[of_old].double().mean() < 0.5
    assert not torch.equal(second, third)
    assert torch.equal(second, unlearning.substitutes(1))


def test_each_epoch_and_each_seed_draw_their_own_images():
    search, triggers = trigger_search(WHITE), [a_trigger("sparse", value) for value in (0.0, 1.0)]
    made = [Unlearning(replace(search, seed=seed), triggers).substitutes(0) for seed in (0, 1)]
    assert not torch.equal(*made)


def test_each_epoch_inverts_on_batches_of_its_own(monkeypatch: pytest.MonkeyPatch):
    seeds: list[int] = []
    monkeypatch.setattr(TriggerSearch, "triggers", lambda self, *_: seeds.append(self.seed) or [])
    unlearning = Unlearning(trigger_search(WHITE), [a_trigger("sparse", 0.0)])
    for epoch in range(3):
        unlearning.substitutes(epoch)
    assert seeds == [_seed_of_epoch(0, 1), _seed_of_epoch(0, 2)]
