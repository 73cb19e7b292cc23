"""The report's pictures: an image and its poisoned twin, what FRG does to it, and what feature maps make of both."""

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
from fmp_core.report.data import Run, Trigger

SHOWN = 6  # feature maps per row of pictures


def pictures(run: Run, trigger: Trigger) -> dict[str, Any]:
    """``example`` (the pair, and their difference) and two rows of maps: ``lowest`` (of the pruned, the lowest of each
    layer) and ``loudest`` (what the trigger moves most, of each layer), each map with its pictures as data URIs."""
    clean, poisoned = to_unit(trigger.clean[:1]), to_unit(trigger.poisoned[:1])
    change = poisoned - clean
    amplify = 0.5 / max(float(change.abs().max()), 1e-6)
    example = {
        "label": int(trigger.labels[0]),
        "clean": _picture(clean[0]),
        "poisoned": _picture(poisoned[0]),
        "change": _picture(0.5 + amplify * change[0]),
        "amplified": amplify,
    }
    maps = run.maps.assign(tac=trigger.tac.numpy())
    by_layer = maps.groupby("layer", sort=False)
    maps["tac_rank"] = by_layer["tac"].rank(ascending=False, method="first").astype(int)
    maps["loudness"] = maps["tac"] / by_layer["tac"].transform("median").clip(lower=1e-12)
    pruned = maps[maps["pruned"].astype(bool)]
    if run.by_trigger:
        pruned = pruned.sort_values("moved", ascending=False)
    elif run.scored:
        pruned = pruned.sort_values(["correct", "margin"])
    lowest = pruned.drop_duplicates("layer").head(SHOWN)
    loudest = maps[maps["tac_rank"] == 1].sort_values("loudness", ascending=False).head(SHOWN)
    wanted = pd.concat([lowest, loudest]).drop_duplicates(["layer", "channel"])
    noise = reversed_changes(run, trigger, clean, wanted)
    activations = activations_of(trigger, torch.cat([clean, poisoned]), wanted)
    sizes = maps.groupby("layer").size()

    def row(chosen: pd.DataFrame) -> list[dict[str, Any]]:
        cards = []
        for place, one in chosen.iterrows():
            before, after = activations[place]
            low, high = (float(f(torch.stack([before, after]))) for f in (torch.amin, torch.amax))
            cards.append(
                {
                    "layer": one["layer"],
                    "channel": int(one["channel"]),
                    "score": f"{one['correct']} of {one['samples']} correct" if run.scored else "",
                    "pruned": bool(one["pruned"]),
                    "tac_rank": int(one["tac_rank"]),
                    "of": int(sizes[one["layer"]]),
                    "frg": _picture(0.5 + 0.5 * noise[place]),
                    "clean": _heat(before, low, high),
                    "poisoned": _heat(after, low, high),
                }
            )
        return cards

    return {"example": example, "lowest": row(lowest), "loudest": row(loudest), **_legend(run)}


def _legend(run: Run) -> dict[str, str]:
    if run.by_trigger:
        return {"name": "reversed", "frg": "what the inverted trigger, the same for all maps, changes in the clean image"}
    return {"name": "FRG", "frg": "the reversed change of the clean image, from -eps (dark) to +eps"}


def reversed_changes(run: Run, trigger: Trigger, image: Tensor, wanted: pd.DataFrame) -> dict[Any, Tensor]:
    """FRG's change of ``image`` ``[1, C, H, W]`` for each map, ``[C, H, W]`` in units of the largest change allowed (-1..1)."""
    if run.by_trigger:
        found_by = load_trigger(run.folder / INVERTED_TRIGGER, image.shape[1:])
        change = (found_by.on(image.cpu()) - image.cpu())[0] / FAMILIES[found_by.family]
        return dict.fromkeys(wanted.index, change)
    settings = run.metrics["settings"]
    eps, steps = float(settings["eps"]), int(settings["frg_steps"])
    attack = FrgSettings(eps, steps, float(settings["alpha"] or 2.5 * eps / steps))
    layers = [layer for layer in trigger.layers if layer.name in set(wanted["layer"])]
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with frozen(trigger.model):
        shared = SharedForward(trigger.model, layers, image, noisy_start(image, noise.to(image.device), eps))
        by_name = {layer.name: layer for layer in layers}
        found = {}
        for place, one in wanted.iterrows():
            reverse = shared.reversed_images(by_name[one["layer"]], [int(one["channel"])], attack)
            found[place] = ((reverse - image) / eps)[0].detach().cpu()
    return found


def activations_of(trigger: Trigger, images: Tensor, wanted: pd.DataFrame) -> dict[Any, tuple[Tensor, Tensor]]:
    """Each map on the two ``images`` ``[2, C, H, W]``: a pair of ``[h, w]``."""
    outputs: dict[str, Tensor] = {}

    def keep(layer: ConvLayer) -> Any:
        return layer.module.register_forward_hook(lambda _module, _inputs, out: outputs.__setitem__(layer.name, out.cpu()))

    handles = [keep(layer) for layer in trigger.layers if layer.name in set(wanted["layer"])]
    try:
        with frozen(trigger.model), torch.inference_mode():
            trigger.model(images)
    finally:
        for handle in handles:
            handle.remove()
    return {place: tuple(outputs[one["layer"]][:, int(one["channel"])]) for place, one in wanted.iterrows()}


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
