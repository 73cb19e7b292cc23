"""BackdoorBench's model names -> modules that take pixels in [0,1]."""

from __future__ import annotations

import difflib
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from reprlib import repr as brief
from typing import Any, cast

import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.transforms import Resize

from fmp_core.data.datasets import DatasetFacts
from fmp_core.data.images import Size
from fmp_core.errors import UserError, in_one_line
from fmp_core.models.preact_resnet import BUILDERS as PREACT_RESNETS
from fmp_core.models.preact_resnet import preact_resnet
from fmp_core.system.devices import to_host

TORCHVISION = [
    "resnet18", "resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "alexnet", "vgg11", "vgg16", "vgg19", "vgg19_bn",
    "squeezenet1_0", "densenet121", "densenet161", "inception_v3", "googlenet", "shufflenet_v2_x1_0", "mobilenet_v2",
    "mobilenet_v3_large", "mnasnet1_0", "efficientnet_b0", "efficientnet_b3", "convnext_tiny",
]  # fmt: skip
AUXILIARY = {"inception_v3": "AuxLogits", "googlenet": "aux1|aux2"}  # torchvision leaves them out of its own trained weights
VISION_TRANSFORMERS = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32")
MODEL_NAMES = (*PREACT_RESNETS, *TORCHVISION, *VISION_TRANSFORMERS)


def build_model(name: str, num_classes: int, auxiliary: bool = True) -> nn.Module:
    """The architecture BB's ``generate_cls_model`` builds under ``name``, with fresh weights (nothing is downloaded).

    Without ``auxiliary`` it lacks the heads of :data:`AUXILIARY`, which training alone uses.

    Raises:
        UserError: BB has no such model, or cannot build it either.
    """
    if name in PREACT_RESNETS:
        return preact_resnet(name, num_classes)
    if name not in TORCHVISION and name not in VISION_TRANSFORMERS:
        raise UserError(f"Model {brief(name)} is not one of BackdoorBench's: {', '.join(MODEL_NAMES)}.")
    options = {"init_weights": False, "aux_logits": auxiliary} if name in AUXILIARY else {}
    network = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    # BB wraps its transformers so that small images fit; hence the prefix "1." of their state keys.
    return nn.Sequential(Resize((224, 224)), network) if name in VISION_TRANSFORMERS else network


def outputs_in_training(network: nn.Module, size: Size) -> Any:
    """What ``network`` gives for two images of ``size`` in training mode, on torch's meta device: shapes, at no cost.

    Raises RuntimeError or ValueError if it cannot take them, NotImplementedError if the meta device lacks an operation.
    """
    height, width, channels = size
    state = {name: torch.empty_like(value, device="meta") for name, value in network.state_dict().items()}
    was_training = network.training
    try:
        return functional_call(network.train(), state, torch.empty(2, channels, height, width, device="meta"))
    finally:
        network.train(was_training)


def load_model(name: str, num_classes: int, state: Mapping[str, Tensor]) -> nn.Module:
    """Build ``name`` and give it ``state``; weights become float32.

    Keys are matched by name, after a prefix that all of them have (or lack) is dropped (or added). Torch's own migrations of
    older states apply (``MLPBlock.linear_1`` of torchvision 0.12, ...). :func:`state_like` goes back to the record's keys.

    Raises:
        UserError: names the first weights that are missing, unknown, of another shape, of the wrong kind or not finite.
    """
    heads = name not in AUXILIARY or any(re.search(rf"\b({AUXILIARY[name]})\.", key) for key in state)
    with torch.device("meta"):  # no time is spent on fresh weights, and no random number is drawn
        network = build_model(name, num_classes, heads)
    own = network.state_dict()
    names = _without_prefix(list(state), list(own))
    strangers = {key: value for key, value in state.items() if names[key] not in own}  # known ones of older versions among them
    if sum(value.numel() for value in strangers.values()) > sum(value.numel() for value in own.values()):
        raise UserError(f"The model has the weights {next(iter(strangers))}, which {name} does not have.")
    given, misshapen = _converted(state, names, own)
    given._metadata = _metadata(state, network)  # type: ignore[attr-defined]
    try:
        missing, unknown = network.load_state_dict(given, strict=False, assign=True)
    except RuntimeError as error:
        raise UserError(f"The model does not fit {name}: {in_one_line(error, 300)}.") from None
    if missing := [key for key in missing if key not in misshapen]:
        near = difflib.get_close_matches(missing[0], unknown[:1000], 1, 0) or [""]
        instead = f", and has {near[0]} instead, which {name} does not have" if near[0] else ""
        more = f" ({len(missing)} are missing, {len(unknown)} unknown)" if len(missing) > 1 else ""
        raise UserError(f"The model lacks the weights {missing[0]} of {name}{instead}{more}.")
    if misshapen:
        key, shape = next(iter(misshapen.items()))
        raise UserError(
            f"The model's {key} has shape {tuple(shape)}, but {name} with {num_classes} classes needs "
            f"{tuple(own[key].shape)}; the architecture or the number of classes is another."
        )
    if unknown:
        raise UserError(f"The model has the weights {unknown[0]}, which {name} does not have.")
    places = {tensor.data_ptr(): key for key, tensor in network.state_dict().items()}
    network.record_keys = {key: places[given[names[key]].data_ptr()] for key in state}  # type: ignore[assignment]
    return network


def _converted(
    state: Mapping[str, Tensor], names: Mapping[str, str], own: Mapping[str, Tensor]
) -> tuple[OrderedDict[str, Tensor], dict[str, torch.Size]]:
    """``state`` under our ``names``, as float32 or int64, and the shapes of weights whose shape is not that of our ``own``.

    These are left out, since ``load_state_dict`` would not report what is missing besides. Raises UserError: numbers are not
    finite, or of the wrong kind.
    """
    given, misshapen = OrderedDict[str, Tensor](), dict[str, torch.Size]()
    for key, value in state.items():
        wanted = own.get(names[key])
        if wanted is not None and value.shape != wanted.shape:
            misshapen[names[key]] = value.shape
            continue
        wrong_kind = wanted is not None and wanted.is_floating_point() and not value.is_floating_point()
        if wrong_kind or (wanted is not None and not value.to(wanted.dtype).isfinite().all()):  # float64 may be beyond float32
            raise UserError(f"The model's {key} holds NaN or infinite numbers, or numbers of the wrong kind; copy it again.")
        given[names[key]] = value.to(torch.float32 if value.is_floating_point() else torch.int64, copy=True)
    return given, misshapen


def _without_prefix(keys: list[str], own: list[str]) -> dict[str, str]:
    """Each key -> the key without the prefix common to all ``keys``, and with that of ``own``; if so more of them are known."""

    def common(names: list[str]) -> str:
        return "".join(os.path.commonprefix(names).rpartition(".")[:2])  # noqa: RUF071 - up to the last dot

    prefix, wanted = common(keys), common(own)
    renamed = {key: wanted + key.removeprefix(prefix) for key in keys}
    better = len(set(own) & set(renamed.values())) > len(set(own) & set(keys))
    return renamed if better else {key: key for key in keys}


def _metadata(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, dict[str, int]]:
    """The versions of modules that torch saved with ``state``; of the network itself, whose key has no name, always one."""
    own = network.state_dict()._metadata  # type: ignore[attr-defined]
    saved = {key: of for key, of in getattr(state, "_metadata", {}).items() if key in own and isinstance(of, Mapping)}
    return {"": own[""], **{key: {"version": of["version"]} for key, of in saved.items() if type(of.get("version")) is int}}


def state_like(network: nn.Module, original: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """The weights of what :func:`load_model` made from ``original``, as CPU tensors with its keys, order and dtypes.

    Those in half precision become float32: rounded they would be another model than the one that was tested.
    """
    current, keys = network.state_dict(), cast("dict[str, str]", network.record_keys)
    values = to_host(current[keys[key]] for key in original)
    kinds = (torch.promote_types(value.dtype, own.dtype) for value, own in zip(original.values(), values, strict=True))
    return OrderedDict((key, own.to(kind)) for key, own, kind in zip(original, values, kinds, strict=True))


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

    def on(self, device: torch.device) -> PixelModel:
        """Itself, moved to ``device``, with weights channels last: convolutions are fastest so."""
        return self.to(device).to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> Tensor:
        out = self.network((pixels - self.mean) / self.std)
        return out if isinstance(out, Tensor) else out.logits  # inception and googlenet add auxiliary heads in training mode
