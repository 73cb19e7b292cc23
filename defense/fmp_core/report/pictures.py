"""The report's pictures: an image with and without the trigger, how FRG changes it, and feature maps on both."""

from __future__ import annotations

import base64
import contextlib
import io
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from fmp_core.frg.reverse import FrgSettings, SharedForward, noisy_start
from fmp_core.inversion.trigger import FAMILIES, INVERTED_TRIGGER, WARPS, load_trigger
from fmp_core.models.evaluate import to_unit
from fmp_core.models.feature_maps import ConvLayer, frozen
from fmp_core.report.data import Run, Trigger

MOST_SHOWN = 6  # feature maps per row of pictures


def pictures(run: Run, trigger: Trigger) -> dict[str, Any]:
    """``example`` (an image with and without the trigger, and the difference) and two rows of feature maps, one per layer:
    ``pruned`` (the first of the pruned) and ``changed`` (those whose activation the trigger changes most). Images are data
    URIs."""
    clean, poisoned = to_unit(trigger.clean[:1]), to_unit(trigger.poisoned[:1])
    pruned, changed = _shown_maps(run, trigger)
    shown = pd.concat([pruned, changed]).drop_duplicates(["layer", "channel"])
    noise = _image_changes(run, trigger, clean, shown)
    activations = _activations(trigger, torch.cat([clean, poisoned]), shown)
    cards = {place: _card(one, run, noise[place], *activations[place]) for place, one in shown.iterrows()}
    return {
        "example": _example(clean[0], poisoned[0], int(trigger.labels[0])),
        "pruned": [cards[place] for place in pruned.index],
        "changed": [cards[place] for place in changed.index],
    }


def _shown_maps(run: Run, trigger: Trigger) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of ``run.maps`` in each row of pictures, with ``tac_rank`` and the layer's size ``of``."""
    maps = run.maps.assign(tac=trigger.tac.numpy(), tac_rank=trigger.ranks().numpy())
    by_layer = maps.groupby("layer", sort=False)["tac"]
    maps["of"] = by_layer.transform("size")
    maps["prominence"] = maps["tac"] / by_layer.transform("median").clip(lower=1e-12)
    pruned = maps[maps["pruned"]]
    if run.by_trigger:
        pruned = pruned.sort_values("moved", ascending=False)
    elif run.scored:
        pruned = pruned.sort_values(["correct", "margin"])
    changed = maps[maps["tac_rank"] == 1].sort_values("prominence", ascending=False)
    return pruned.drop_duplicates("layer").head(MOST_SHOWN), changed.head(MOST_SHOWN)


def _example(clean: Tensor, poisoned: Tensor, label: int) -> dict[str, Any]:
    change = poisoned - clean
    amplify = 0.5 / max(float(change.abs().max()), 1e-6)
    shown = {"clean": _picture(clean), "poisoned": _picture(poisoned), "change": _picture(0.5 + amplify * change)}
    return {"label": label, "amplified": amplify, **shown}


def _card(one: pd.Series, run: Run, noise: Tensor, clean: Tensor, poisoned: Tensor) -> dict[str, Any]:
    """One feature map: ``noise`` ``[C, H, W]`` in -1..1, its activations ``[h, w]``. A map of one pixel is shown as numbers."""
    pair = torch.stack([clean, poisoned])
    low, high = float(pair.min()), float(pair.max())
    return {
        **one,
        "score": f"{one['correct']} of {one['samples']} correct" if run.scored else "",
        "noise": _picture(0.5 + 0.5 * noise),
        "activations": [_heat(values, low, high) for values in pair] if clean.numel() > 1 else None,
        "numbers": [f"{float(values.mean()):.3g}" for values in pair],
    }


def _image_changes(run: Run, trigger: Trigger, image: Tensor, shown: pd.DataFrame) -> dict[Any, Tensor]:
    """How ``image`` ``[1, C, H, W]`` is changed for each map of ``shown``, by its index: ``[C, H, W]`` in units of the largest
    change allowed (-1..1); for a warp, whose bound is a distance, in units of its own largest. FRG changes it for each map
    apart, an inverted trigger for all alike."""
    if run.by_trigger:
        inverted = load_trigger(run.folder / INVERTED_TRIGGER, image.shape[1:])
        change = (inverted.apply(image.cpu()) - image.cpu())[0]
        largest = max(float(change.abs().max()), 1e-6)
        bound = largest if inverted.family in WARPS else FAMILIES[inverted.family]
        return dict.fromkeys(shown.index, change / bound)
    settings = run.summary.settings
    frg = FrgSettings(float(settings["eps"]), int(settings["frg_steps"]), settings["alpha"])
    layers = _layers_of(shown, trigger)
    start = noisy_start(image, frg.eps, frg.seed)
    changes = {}
    with frozen(trigger.model):
        shared = SharedForward(trigger.model, list(layers.values()), image, start)
        for place, one in shown.iterrows():
            changed = shared.reversed_images(layers[one["layer"]], [int(one["channel"])], frg)
            changes[place] = ((changed - image) / frg.eps)[0].detach().cpu()
    return changes


def _activations(trigger: Trigger, images: Tensor, shown: pd.DataFrame) -> dict[Any, Tensor]:
    """Each map of ``shown``, by its index, on the two ``images`` ``[2, C, H, W]``: ``[2, h, w]``."""
    outputs: dict[str, Tensor] = {}
    with contextlib.ExitStack() as hooks, frozen(trigger.model), torch.inference_mode():
        for name, layer in _layers_of(shown, trigger).items():
            hook = layer.module.register_forward_hook(  # a copy: a ReLU after the convolution may work in place
                lambda _module, _in, out, name=name: outputs.update({name: out.to("cpu", copy=True)})
            )
            hooks.callback(hook.remove)
        trigger.model(images)
    return {place: outputs[one["layer"]][:, int(one["channel"])] for place, one in shown.iterrows()}


def _layers_of(shown: pd.DataFrame, trigger: Trigger) -> dict[str, ConvLayer]:
    return {layer.name: layer for layer in trigger.layers if layer.name in set(shown["layer"])}


def _picture(pixels: Tensor) -> str:
    """``[C, H, W]`` in [0,1] as a PNG data URI."""
    return _uri((pixels.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).squeeze(-1).numpy())


def _heat(values: Tensor, low: float, high: float) -> str:
    """``[h, w]`` in a perceptually even, colour-blind-safe scale from ``low`` to ``high``."""
    shares = (values.numpy() - low) / max(high - low, 1e-12)
    return _uri((matplotlib.colormaps["viridis"](shares)[..., :3] * 255).round().astype(np.uint8))


def _uri(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
