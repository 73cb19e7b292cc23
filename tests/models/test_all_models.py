"""The shared forward passes and single-channel backward passes agree with the per-map loop on every kind of model BB builds."""

import pytest
import torch
import torch.nn.functional as F
from fmp_core.frg.reverse import SharedForward
from fmp_core.models.build import build_model
from fmp_core.models.fast_ops import FastOps
from fmp_core.models.feature_maps import frozen, trace_conv_layers
from reference import gradient, start
from torch import nn

EPS = 8 / 255
MODELS = [
    "preactresnet18",
    "preactresnet34",
    "preactresnet50",
    "resnet18",
    "resnet50",
    "vgg19",
    "vgg19_bn",
    "densenet161",
    "mobilenet_v3_large",
    "efficientnet_b3",
    "convnext_tiny",
    "vit_b_16",
]


SLOW = {"preactresnet34", "preactresnet50", "vgg19", "densenet161", "vit_b_16"}  # seconds each


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MODELS])
def test_gradients_and_logits_are_those_of_the_plain_model(name: str):
    torch.manual_seed(0)
    model = build_model(name, 10)
    for module in model.modules():  # fresh batch norms are identities, which hide mistakes and let signals die away
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(16, 3, 32, 32))
    model.eval()
    images = torch.rand(2, 3, 32, 32)
    noisy = start(images, EPS, 0)
    layers = trace_conv_layers(model, images[:1])
    middle = next((layer for layer in layers if layer.module.groups > 1), layers[len(layers) // 2])
    with frozen(model):
        shared = SharedForward(model, layers, images, noisy)
        for layer in {layers[0].name: layers[0], middle.name: middle, layers[-1].name: layers[-1]}.values():
            channel = layer.channels // 3
            pair = shared.gradient(layer, [channel]), gradient(model, layer.module, channel, images, noisy)
            # Gradients of fresh deep nets may be tiny; only each image's direction counts.
            ours, plain = (grad.flatten(1).double() / grad.abs().amax((1, 2, 3))[:, None] for grad in pair)
            assert F.cosine_similarity(ours, plain, dim=1).min() > 0.999, layer.name
        with torch.inference_mode(), FastOps():
            logits = model(images)
        torch.testing.assert_close(logits, model(images), rtol=1e-3, atol=1e-4)
