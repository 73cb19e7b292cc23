"""Operations are counted without data, and as often as they are run."""

import pytest
import torch
from fmp_core.benchmark.measure import released_scheme
from fmp_core.benchmark.operations import CountOperations, operations_per_map
from toy import Plain
from toy_cases import toy_case


def test_views_are_no_operations():
    tensor = torch.ones(2, 3, device="meta")
    with CountOperations() as counted:
        (tensor.view(6)[1:].detach() * 2).add_(1)
    assert counted.count == 2


def test_the_released_scheme_takes_the_same_for_each_batch_of_32_and_ours_shares_passes():
    model, images, _ = toy_case(Plain, count=2)
    few, many = (operations_per_map(model, images[:1], count, released_scheme) for count in (32, 64))
    assert many["released"] == pytest.approx(2 * few["released"])
    assert 0 < few["ours"] < few["released"]
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
