"""BackdoorBench's model names, state keys and shapes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from fmp_core.data.datasets import FACTS
from fmp_core.errors import UserError
from fmp_core.models.build import MODEL_NAMES, VISION_TRANSFORMERS, PixelModel, build_model, load_model, state_like
from fmp_core.models.preact_resnet import preact_resnet
from PIL import Image
from torch import nn
from torchvision.models import VisionTransformer, list_models
from torchvision.models._api import register_model
from torchvision.transforms import Compose, Normalize, ToTensor

# name: state keys, Conv2d, their output channels, depthwise ones, BatchNorm2d, the last Linear and its inputs, for 10 classes.
# All but preactresnet34 and 50 were counted on BackdoorBench's own modules; those two follow from their depths.
COUNTS = {
    "preactresnet18": (102, 20, 4800, 0, 16, "linear", 512),
    "preactresnet34": (198, 36, 8512, 0, 32, "linear", 512),
    "preactresnet50": (295, 53, 26560, 0, 48, "linear", 2048),
    "vgg19": (38, 16, 5504, 0, 0, "classifier.6", 4096),
    "vgg19_bn": (118, 16, 5504, 0, 16, "classifier.6", 4096),
    "densenet161": (967, 160, 20448, 0, 161, "classifier", 2208),
    "mobilenet_v3_large": (312, 62, 17280, 15, 46, "classifier.3", 1280),
    "efficientnet_b3": (574, 130, 63728, 26, 78, "classifier.1", 1536),
    "convnext_tiny": (182, 22, 8064, 18, 0, "classifier.2", 768),
    "vit_b_16": (152, 1, 768, 0, 0, "1.heads.head", 768),
    "resnet18": (122, 20, 4800, 0, 20, "fc", 512),
}


def on_meta(name: str, num_classes: int = 10) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, num_classes)


def fresh_state(name: str = "squeezenet1_0", num_classes: int = 10) -> OrderedDict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {key: value.shape for key, value in on_meta(name, num_classes).state_dict().items()}
    return OrderedDict((key, torch.rand(shape, generator=generator) * 0.1) for key, shape in shapes.items())


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_name_builds_for_any_number_of_classes(name: str):
    model = on_meta(name, 7)
    linears = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]
    convs = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert convs and 7 in (linears[-1:] or convs[-1:])  # squeezenet ends in a convolution


@pytest.mark.parametrize("name", COUNTS)
def test_a_model_has_backdoorbenchs_parts(name: str):
    model = on_meta(name)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    last, linear = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    depthwise = sum(conv.groups > 1 and conv.groups == conv.in_channels for conv in convs)
    channels = sum(conv.out_channels for conv in convs)
    found = (len(model.state_dict()), len(convs), channels, depthwise, len(norms), last, linear.in_features)
    assert found == COUNTS[name]


def test_preactresnet18_has_backdoorbenchs_keys_in_their_order():
    keys = list(on_meta("preactresnet18").state_dict())
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    block = [*(f"bn1.{n}" for n in norm), "conv1.weight", *(f"bn2.{n}" for n in norm), "conv2.weight"]
    expected = ["conv1.weight"]
    for layer in range(1, 5):
        for number in range(2):
            expected += [f"layer{layer}.{number}.{key}" for key in block]
            if layer > 1 and number == 0:
                expected.append(f"layer{layer}.0.shortcut.0.weight")
    assert keys == [*expected, "linear.weight", "linear.bias"]


def test_preactresnet18_has_backdoorbenchs_shapes():
    state = on_meta("preactresnet18", 43).state_dict()
    shapes = {key: tuple(state[key].shape) for key in state}
    assert shapes["conv1.weight"] == (64, 3, 3, 3)
    assert shapes["layer1.0.conv1.weight"] == (64, 64, 3, 3)
    assert shapes["layer2.0.bn1.weight"] == (64,) and shapes["layer2.0.bn2.weight"] == (128,)
    assert shapes["layer2.0.shortcut.0.weight"] == (128, 64, 1, 1)
    assert shapes["layer4.1.conv2.weight"] == (512, 512, 3, 3)
    assert shapes["linear.weight"] == (43, 512)


@pytest.mark.parametrize("name", ["preactresnet18", "preactresnet50"])
@pytest.mark.parametrize("side", [32, 40])
def test_preactresnets_take_images_of_any_size(name: str, side: int):
    torch.manual_seed(0)
    model = preact_resnet(name, 6).eval()
    with torch.inference_mode():
        assert model(torch.rand(1, 3, side, side)).shape == (1, 6)


def test_preactresnet18_pools_features_without_a_last_relu():
    torch.manual_seed(0)
    model = preact_resnet("preactresnet18", 6).eval()
    pooled: list[torch.Tensor] = []
    model.avgpool.register_forward_hook(lambda module, inputs, output: pooled.append(output))
    with torch.inference_mode():
        model(torch.rand(1, 3, 32, 32))
    assert float(pooled[0].min()) < 0


@pytest.mark.parametrize("name", ["resnext29", "PreActResNet18", "", "../resnet18"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str):
    with pytest.raises(UserError, match=r"not one of BackdoorBench's: preactresnet18, .*vit_l_32"):
        build_model(name, 10)


def test_weights_are_loaded_by_name_whatever_their_order():
    state = fresh_state()
    loaded = load_model("squeezenet1_0", 10, OrderedDict(reversed(state.items()))).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


@pytest.mark.parametrize("name", ["squeezenet1_0", "shufflenet_v2_x1_0"])
def test_a_loaded_model_is_whole_and_its_own(name: str):
    state = fresh_state(name)
    model = load_model(name, 10, state)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    first = next(model.parameters())
    with torch.no_grad():
        first.zero_()
    assert float(next(iter(state.values())).abs().sum()) > 0  # the record's tensors are left alone


def test_loading_draws_no_random_number():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_model("squeezenet1_0", 10, fresh_state())
    assert torch.equal(torch.rand(1), expected)


def test_the_first_missing_weights_are_named():
    state = fresh_state()
    del state["features.3.squeeze.weight"], state["features.4.squeeze.weight"]
    with pytest.raises(UserError, match=r"lacks the weights features\.3\.squeeze\.weight of squeezenet1_0"):
        load_model("squeezenet1_0", 10, state)


def test_the_first_unknown_weights_are_named():
    state = fresh_state()
    state["extra.weight_mask"] = torch.ones(1)
    with pytest.raises(UserError, match=r"has the weights extra\.weight_mask, which squeezenet1_0 does not have"):
        load_model("squeezenet1_0", 10, state)


def test_a_misspelt_key_is_named_beside_the_wanted_one():
    state = fresh_state()
    state["features.3.squeeze.weigth"] = state.pop("features.3.squeeze.weight")
    with pytest.raises(UserError, match=r"lacks the weights features\.3\.squeeze\.weight .*has features\.3\.squeeze\.weigth"):
        load_model("squeezenet1_0", 10, state)


@pytest.mark.parametrize("prefix", ["model.", "net.backbone."])
def test_a_prefix_of_all_keys_is_no_hindrance_and_comes_back(prefix: str):
    state = OrderedDict((prefix + key, value) for key, value in fresh_state().items())
    model = load_model("squeezenet1_0", 10, state)
    back = state_like(model, state)
    assert list(back) == list(state) and all(torch.equal(back[key], value) for key, value in state.items())


def loads(name: str, rename: Callable[[str], str] = str, versions: bool = True) -> None:
    """A state of float16 numbers is loaded, and comes back with the same values under the keys it had."""
    own = on_meta(name).state_dict()
    state: OrderedDict[str, torch.Tensor] = OrderedDict()
    for number, (key, value) in enumerate(own.items()):
        kind = torch.float16 if value.is_floating_point() else value.dtype
        state[rename(key)] = torch.full(value.shape, number % 2048, dtype=kind)
    if versions:
        state._metadata = own._metadata  # type: ignore[attr-defined]
    model = load_model(name, 10, state)
    for number, value in enumerate(model.state_dict().values()):
        assert value.is_floating_point() == (value.dtype == torch.float32) and (value == number % 2048).all()
    back = state_like(model, state)
    assert list(back) == list(state)
    assert all(torch.equal(back[key].float(), value.float()) for key, value in state.items())


@pytest.mark.parametrize("versions", [True, False])
@pytest.mark.parametrize("name", ["squeezenet1_0", "mnasnet1_0", "shufflenet_v2_x1_0"])
def test_a_state_of_small_models_loads(name: str, versions: bool):
    loads(name, versions=versions)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_state_of_every_name_loads(name: str):
    loads(name, versions=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", VISION_TRANSFORMERS)
def test_transformers_of_torchvision_0_12_load(name: str):
    """BackdoorBench pins it: there the layers of an MLP have names of their own."""
    loads(name, lambda key: key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."), versions=False)


def test_the_migration_of_transformers_is_torchs(monkeypatch: pytest.MonkeyPatch):
    """As above, on a transformer that is small enough for every day."""
    if "tiny_vit" not in list_models():
        layers = {"patch_size": 16, "num_layers": 1, "num_heads": 1, "hidden_dim": 4, "mlp_dim": 3}
        register_model("tiny_vit")(
            lambda weights=None, num_classes=10: VisionTransformer(224, num_classes=num_classes, **layers)
        )
    monkeypatch.setattr("fmp_core.models.build.VISION_TRANSFORMERS", ("tiny_vit",))
    loads("tiny_vit", lambda key: key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."), versions=False)
    loads("tiny_vit", lambda key: key.removeprefix("1."), versions=False)


def test_weights_of_another_shape_are_named_with_both():
    with pytest.raises(
        UserError, match=r"classifier\.1\.weight has shape \(10, 512, 1, 1\).* 43 classes needs \(43, 512, 1, 1\)"
    ):
        load_model("squeezenet1_0", 43, fresh_state())


def test_weights_of_another_model_are_refused():
    with pytest.raises(UserError, match=r"lacks the weights conv1\.weight of resnet18"):
        load_model("resnet18", 10, fresh_state())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_weights_run_in_float32_and_return_in_their_own_type_but_not_rounded(kind: torch.dtype):
    state = OrderedDict((key, value.to(kind)) for key, value in reversed(fresh_state("shufflenet_v2_x1_0").items()))
    for key in state:
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
    model = load_model("shufflenet_v2_x1_0", 10, state)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    back = state_like(model, state)
    assert list(back) == list(state)
    for key, value in state.items():
        assert back[key].dtype == torch.promote_types(value.dtype, model.state_dict()[key].dtype), key
        assert torch.equal(back[key].float(), value.float()), key
    with torch.no_grad():
        model.fc.bias += 1e-6
    assert torch.equal(state_like(model, state)["fc.bias"].float(), model.fc.bias)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "gtsrb", "tiny"])
def test_normalisation_inside_the_model_is_torchvisions(name: str):
    facts = FACTS[name]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*facts.size[:2], 3), dtype=np.uint8))
    theirs = Compose([ToTensor(), Normalize(facts.mean, facts.std)])(image)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
    ours = PixelModel(nn.Identity(), facts)(pixels[None])[0]
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_normalisation_adds_no_state():
    network = build_model("squeezenet1_0", 10)
    assert list(PixelModel(network, FACTS["cifar10"]).state_dict()) == [f"network.{key}" for key in network.state_dict()]


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_auxiliary_heads_may_be_missing(name: str):
    """As they are in torchvision's own trained weights, and in what is made of these."""
    with torch.device("meta"):
        state = torchvision.models.get_model(name, num_classes=10, aux_logits=False, init_weights=False).state_dict()
    state = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in state.items()}
    assert list(state_like(load_model(name, 10, state), state)) == list(state)
    del state["fc.bias"]
    with pytest.raises(UserError, match=rf"lacks the weights fc.bias of {name}\."):
        load_model(name, 10, state)


def test_auxiliary_heads_do_not_reach_the_loss():
    class Outputs(tuple):
        logits = torch.ones(1, 2)

    class WithHeads(nn.Module):
        def forward(self, x: torch.Tensor) -> Outputs:
            return Outputs()

    assert torch.equal(PixelModel(WithHeads(), FACTS["gtsrb"])(torch.zeros(1, 3, 2, 2)), Outputs.logits)
