"""The cheaper forms compute what the plain network computes."""

import pytest
import torch
import torch.nn.functional as F
from fmp_core.models import fast_ops
from fmp_core.models.fast_ops import ConvCall, FastOps, to_precision
from torch import Tensor, nn


@pytest.fixture(autouse=True, params=["matrix products", "convolutions"])
def hardware(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the two runs depends on the CPU; both must be right on any."""
    monkeypatch.setattr(fast_ops, "has_amx", lambda: request.param == "matrix products")


class Mixed(nn.Module):
    """Batch norm with and without a ReLU after it, a ReLU of its own, and convolutions down to 2x2 outputs."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.plain_norm = nn.BatchNorm2d(8, affine=False)
        self.few = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.even = nn.Conv2d(12, 6, 2, padding="same")
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = self.plain_norm(self.second(x))
        x = torch.relu(self.few(x))
        return self.linear(self.even(x).mean((2, 3)))


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    net = Mixed()
    for norm in (net.norm, net.plain_norm):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return net.eval().requires_grad_(False)


def test_logits_and_input_gradients_are_the_plain_ones(network: nn.Module):
    images = torch.rand(5, 3, 8, 8)
    results = []
    for mode in (FastOps(), torch.enable_grad()):
        leaf = images.clone().requires_grad_()
        with mode:
            logits = network(leaf)
        results.append((logits, torch.autograd.grad(logits.square().sum(), leaf)[0]))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_without_gradients_too(network: nn.Module):
    images = torch.rand(5, 3, 8, 8)
    with torch.inference_mode(), FastOps():
        ours = network(images)
    torch.testing.assert_close(ours, network(images), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_a_convolution_with_few_outputs_is_a_convolution(stride: int, padding: int):
    images = torch.randn(3, 4, 5, 4, dtype=torch.float64)
    conv = nn.Conv2d(4, 6, 3, stride, padding).double().requires_grad_(False)
    ours, plain = images.clone().requires_grad_(), images.clone().requires_grad_()
    with FastOps(torch.float64):
        out = conv(ours)
    expected = conv(plain)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad((o * weight).sum(), i)[0] for o, i in ((out, ours), (expected, plain))))


def test_training_mode_batch_norm_is_left_to_torch(network: nn.Module):
    images = torch.rand(5, 3, 8, 8)
    network.norm.train()
    before = network.norm.running_mean.clone()
    with FastOps():
        network(images.requires_grad_())
    assert not torch.equal(before, network.norm.running_mean)


def test_replayed_masks_decide_where_gradients_pass():
    leaf = torch.tensor([[[[1.0, 2.0]]]], requires_grad=True)
    with FastOps(replay=iter([torch.tensor([[[[False, True]]]])])):
        out = F.relu(leaf)
    assert torch.autograd.grad(out.sum(), leaf)[0].flatten().tolist() == [0, 1]


def test_masks_are_recorded_in_order(network: nn.Module):
    masks: list[Tensor] = []
    with torch.no_grad(), FastOps(record=masks):
        network(torch.rand(2, 3, 8, 8))
    assert [tuple(mask.shape) for mask in masks] == [(2, 8, 8, 8), (2, 12, 2, 2)]


def test_watched_outputs_survive_in_place_changes():
    conv = nn.Conv2d(1, 1, 1, bias=False).requires_grad_(False)
    seen: list[Tensor] = []

    def keep(call: ConvCall, out: Tensor) -> None:
        seen.append(out)

    with torch.no_grad(), FastOps(on_convolution={id(conv.weight): keep}):
        conv(torch.ones(1, 1, 1, 1)).mul_(0)
    assert seen[0].item() == conv.weight.item()


def test_a_low_precision_copy_keeps_pixels_norms_and_logits_exact(network: nn.Module):
    low_precision = to_precision(network, network.first, torch.bfloat16)
    kept = [name for name, p in low_precision.named_parameters() if p.dtype == torch.float32]
    assert kept == ["first.weight", "norm.weight", "norm.bias", "linear.weight", "linear.bias"]
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    with torch.inference_mode(), FastOps(torch.bfloat16):
        logits = low_precision(torch.rand(4, 3, 8, 8))
    assert logits.dtype == torch.float32


def test_float32_needs_no_copy(network: nn.Module):
    assert to_precision(network, network.first, torch.float32) is network


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 48), (5, 3, 3, 48)])
def test_linear_layers_and_smooth_activations_do_not_depend_on_the_number_of_rows(dtype: torch.dtype, shape: tuple[int, ...]):
    torch.manual_seed(0)
    linear = nn.Linear(48, 10, dtype=dtype).eval()
    few = torch.randn(shape, dtype=dtype)
    many = few.repeat(40, *[1] * (len(shape) - 1))
    for function in (linear, nn.SiLU(inplace=True), nn.GELU(approximate="tanh"), nn.Sigmoid()):
        with torch.inference_mode(), FastOps(dtype):
            ours, all_rows = function(few.clone()), function(many.clone())
        assert torch.equal(ours, all_rows[:5])
        torch.testing.assert_close(ours, function(few.clone()))


class InPlace(nn.Module):
    """Reads what was changed in place through a keyword, and through a statement."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 5, 3), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        torch.relu_(y)
        z = torch.add(y, other=y, alpha=2)
        self.act(z)
        return z.mean((2, 3))


@pytest.mark.parametrize("gradients", [False, True])
def test_what_an_operation_in_place_left_is_read_whoever_reads_it(gradients: bool) -> None:
    torch.manual_seed(0)
    network, images = InPlace(), torch.randn(3, 3, 9, 9)
    with torch.set_grad_enabled(gradients):
        expected = network(images.clone().requires_grad_(gradients))
        with FastOps():
            found = network(images.clone().requires_grad_(gradients))
    assert torch.allclose(found, expected, atol=1e-6)
