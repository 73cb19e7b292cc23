"""The report's pictures: an image with and without the trigger, how FRG changes it, and feature maps on both."""

from __future__ import annotations

import base64
import io
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from fmp_core.frg.reverse import FrgSettings, SharedForward, noisy_start
from fmp_core.inversion.trigger import FAMILIES, INVERTED_TRIGGER, load_trigger
from fmp_core.models.evaluate import to_unit
from fmp_core.models.feature_maps import ConvLayer, frozen
from fmp_core.report.data import Attacked, Run, Trigger

MOST_SHOWN = 6  # feature maps per row of pictures


def pictures(run: Run, trigger: Trigger) -> dict[str, Any]:
    """``example`` (an image with and without the trigger, and the difference) and two rows of feature maps, one per layer:
    ``pruned`` (the first of the pruned) and ``changed`` (those whose activation the trigger changes most). Images are data
    URIs."""
    clean, poisoned = to_unit(trigger.clean[:1]), to_unit(trigger.poisoned[:1])
    pruned, changed = _shown_maps(run, trigger)
    shown = pd.concat([pruned, changed]).drop_duplicates(["layer", "channel"])
    noise = image_changes(run, trigger, clean, shown)
    activations = activations_of(trigger.attacked, torch.cat([clean, poisoned]), shown)
    cards = {place: _card(one, run, noise[place], *activations[place]) for place, one in shown.iterrows()}
    legend = {"name": "FRG", "means": "the change FRG makes to the clean image, from -eps (dark) to +eps"}
    if run.by_trigger:
        legend = {"name": "inverted", "means": "what the inverted trigger, the same for all maps, changes in the clean image"}
    return {
        "example": _example(clean[0], poisoned[0], int(trigger.labels[0])),
        "pruned": [cards[place] for place in pruned.index],
        "changed": [cards[place] for place in changed.index],
        **legend,
    }


def _shown_maps(run: Run, trigger: Trigger) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of ``run.maps`` in each row of pictures, with ``tac_rank`` and the layer's size ``of``."""
    maps = run.maps.assign(tac=trigger.tac.numpy(), tac_rank=trigger.ranks().numpy())
    by_layer = maps.groupby("layer", sort=False)
    maps["of"] = by_layer["tac"].transform("size")
    maps["prominence"] = maps["tac"] / by_layer["tac"].transform("median").clip(lower=1e-12)
    pruned = maps[maps["pruned"].astype(bool)]
    if run.by_trigger:
        pruned = pruned.sort_values("moved", ascending=False)
    elif run.scored:
        pruned = pruned.sort_values(["correct", "margin"])
    changed = maps[maps["tac_rank"] == 1].sort_values("prominence", ascending=False)
    return pruned.drop_duplicates("layer").head(MOST_SHOWN), changed.head(MOST_SHOWN)


def _example(clean: Tensor, poisoned: Tensor, label: int) -> dict[str, Any]:
    change = poisoned - clean
    amplify = 0.5 / max(float(change.abs().max()), 1e-6)
    return {
        "label": label,
        "clean": _picture(clean),
        "poisoned": _picture(poisoned),
        "change": _picture(0.5 + amplify * change),
        "amplified": amplify,
    }


def _card(one: pd.Series, run: Run, noise: Tensor, clean: Tensor, poisoned: Tensor) -> dict[str, Any]:
    """One feature map: ``noise`` ``[C, H, W]`` in -1..1, its activations ``[h, w]``. A map of one pixel is shown as numbers."""
    low, high = (float(f(torch.stack([clean, poisoned]))) for f in (torch.amin, torch.amax))
    pair = (clean, poisoned)
    return {
        "layer": one["layer"],
        "channel": int(one["channel"]),
        "score": f"{one['correct']} of {one['samples']} correct" if run.scored else "",
        "pruned": bool(one["pruned"]),
        "tac_rank": int(one["tac_rank"]),
        "of": int(one["of"]),
        "noise": _picture(0.5 + 0.5 * noise),
        "activations": [_heat(values, low, high) for values in pair] if clean.numel() > 1 else None,
        "numbers": [f"{float(values.mean()):.3g}" for values in pair],
    }


def image_changes(run: Run, trigger: Trigger, image: Tensor, shown: pd.DataFrame) -> dict[Any, Tensor]:
    """How ``image`` ``[1, C, H, W]`` is changed for each map of ``shown``, by its index: ``[C, H, W]`` in units of the largest
    change allowed (-1..1). FRG changes it for each map apart, an inverted trigger for all alike."""
    if run.by_trigger:
        inverted = load_trigger(run.folder / INVERTED_TRIGGER, image.shape[1:])
        change = (inverted.apply(image.cpu()) - image.cpu())[0] / FAMILIES[inverted.family]
        return dict.fromkeys(shown.index, change)
    settings = run.summary.settings
    frg = FrgSettings(float(settings["eps"]), int(settings["frg_steps"]), settings["alpha"])
    layers = {layer.name: layer for layer in trigger.attacked.layers if layer.name in set(shown["layer"])}
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    start = noisy_start(image, noise.to(image.device), frg.eps)
    with frozen(trigger.attacked.model):
        shared = SharedForward(trigger.attacked.model, list(layers.values()), image, start)
        changes = {}
        for place, one in shown.iterrows():
            changed = shared.reversed_images(layers[one["layer"]], [int(one["channel"])], frg)
            changes[place] = ((changed - image) / frg.eps)[0].detach().cpu()
    return changes


def activations_of(attacked: Attacked, images: Tensor, shown: pd.DataFrame) -> dict[Any, tuple[Tensor, Tensor]]:
    """Each map of ``shown``, by its index, on the two ``images`` ``[2, C, H, W]``: a pair of ``[h, w]``."""
    outputs: dict[str, Tensor] = {}

    def keep(layer: ConvLayer) -> Any:
        return layer.module.register_forward_hook(lambda _module, _inputs, out: outputs.__setitem__(layer.name, out.cpu()))

    handles = [keep(layer) for layer in attacked.layers if layer.name in set(shown["layer"])]
    try:
        with frozen(attacked.model), torch.inference_mode():
            attacked.model(images)
    finally:
        for handle in handles:
            handle.remove()
    return {place: tuple(outputs[one["layer"]][:, int(one["channel"])]) for place, one in shown.iterrows()}


def _picture(pixels: Tensor) -> str:
    """``[C, H, W]`` in [0,1] as a PNG data URI."""
    array = (pixels.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).squeeze(-1).numpy()
    return _uri(array)


def _heat(values: Tensor, low: float, high: float) -> str:
    """``[h, w]`` in a perceptually even, colour-blind-safe scale from ``low`` to ``high``."""
    shares = (values.numpy() - low) / max(high - low, 1e-12)
    return _uri((matplotlib.colormaps["viridis"](shares)[..., :3] * 255).round().astype(np.uint8))


def _uri(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
