"""BackdoorBench's model names -> modules that take pixels in [0,1]."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from reprlib import repr as brief

import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms import Resize

from fmp_core.data.datasets import DatasetFacts
from fmp_core.errors import UserError
from fmp_core.models.preact_resnet import BUILDERS as PREACT_RESNETS
from fmp_core.models.preact_resnet import preact_resnet

TORCHVISION = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "alexnet",
    "vgg11",
    "vgg16",
    "vgg19",
    "vgg19_bn",
    "squeezenet1_0",
    "densenet121",
    "densenet161",
    "inception_v3",
    "googlenet",
    "shufflenet_v2_x1_0",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mnasnet1_0",
    "efficientnet_b0",
    "efficientnet_b3",
    "convnext_tiny",
]
VISION_TRANSFORMERS = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32")
MODEL_NAMES = (*PREACT_RESNETS, *TORCHVISION, *VISION_TRANSFORMERS)


def build_model(name: str, num_classes: int) -> nn.Module:
    """The architecture BB's ``generate_cls_model`` builds under ``name``, with fresh weights (nothing is downloaded).

    Raises:
        UserError: BB has no such model, or cannot build it either.
    """
    if name in PREACT_RESNETS:
        return preact_resnet(name, num_classes)
    if name in VISION_TRANSFORMERS:
        # BB wraps its transformers so that small images fit; hence the prefix "1." of their state keys.
        vit = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
        return nn.Sequential(Resize((224, 224)), vit)
    if name in ("inception_v3", "googlenet"):
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes, init_weights=False)
    if name in TORCHVISION:
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    raise UserError(f"Model {brief(name)} is not one of BackdoorBench's: {', '.join(MODEL_NAMES)}.")


def load_model(name: str, num_classes: int, state: Mapping[str, Tensor]) -> nn.Module:
    """Build ``name`` and give it ``state``, matched by key; weights become float32.

    Raises:
        UserError: names the first key that is missing, unknown or of another shape.
    """
    with torch.device("meta"):  # no time is spent on fresh weights, and no random number is drawn
        model = build_model(name, num_classes)
    for key, own in model.state_dict().items():
        if key not in state:
            raise UserError(f"The record's model lacks the weights {key} of {name}.")
        if state[key].shape != own.shape:
            raise UserError(
                f"The record's {key} has shape {tuple(state[key].shape)}, but {name} with {num_classes} classes needs "
                f"{tuple(own.shape)}; the record's model_name or num_classes is wrong."
            )
        wrong_kind = own.is_floating_point() > state[key].is_floating_point()
        if wrong_kind or not state[key].to(own.dtype).isfinite().all():  # float64 may be finite and yet beyond float32
            raise UserError(f"The record's {key} holds NaN or infinite numbers, or numbers of the wrong kind; it is damaged.")
    unknown = next((key for key in state if key not in model.state_dict()), None)
    if unknown is not None:
        raise UserError(f"The record's model has the weights {unknown}, which {name} does not have.")
    own_state = model.state_dict()
    model.load_state_dict({key: value.to(own_state[key].dtype, copy=True) for key, value in state.items()}, assign=True)
    return model


def state_like(model: nn.Module, original: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """The weights of ``model`` as CPU tensors, in the key order and dtypes of ``original``."""
    current = model.state_dict()
    return OrderedDict((key, current[key].detach().cpu().to(value.dtype)) for key, value in original.items())


class PixelModel(nn.Module):
    """Normalisation inside the model: ``[B, C, H, W]`` pixels in [0,1] -> ``[B, num_classes]`` logits.

    FRG's perturbation bound and its clamp to [0,1] mean something only in pixel space. ``network`` is the bare BB model.
    """

    def __init__(self, network: nn.Module, facts: DatasetFacts):
        super().__init__()
        self.network = network
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(facts.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(facts.std).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        out = self.network((pixels - self.mean) / self.std)
        return out if isinstance(out, Tensor) else out.logits  # inception and googlenet add auxiliary heads in training mode
