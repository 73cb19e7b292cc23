"""Images to unlearn: clean ones that carry inverted triggers."""

from __future__ import annotations

import torch
from fmp_core.repair.unlearning import _seed_of_epoch, with_random_triggers
from planted import a_trigger, images_of


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
