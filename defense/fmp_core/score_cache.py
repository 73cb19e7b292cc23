"""Scores kept beside the result, named by what they depend on, so that sweeps over p or fine-tuning rank once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .errors import UserError
from .feature_maps import ConvLayer
from .files import write_torch
from .ranking import Scores
from .safe_load import load_torch_file


def content_key(state: Mapping[str, Tensor], images: Tensor, labels: Tensor, settings: Mapping[str, Any]) -> str:
    """SHA-256 over weights, images, labels, settings and the versions that decide rounding."""
    digest = hashlib.sha256()
    about = {**settings, "fmp": __version__, "torch": torch.__version__, "device": images.device.type}
    digest.update(json.dumps(about, sort_keys=True).encode())
    for name, tensor in (*state.items(), ("images", images), ("labels", labels)):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def cache_file(folder: Path, key: str) -> Path:
    """Where the scores of ``key`` lie below the result folder."""
    return folder / "cache" / f"scores_{key[:16]}.pt"


def save_scores(folder: Path, key: str, scores: Scores) -> None:
    """Write the scores, whole or not at all."""
    settled = torch.ones(scores.total, dtype=torch.bool) if scores.settled is None else scores.settled
    content = {
        "key": key,
        "correct": scores.correct,
        "margin": scores.margin,
        "slimmest": scores.slimmest,
        "logits": scores.logits,
        "samples": scores.samples,
        "settled": settled,
    }
    write_torch(cache_file(folder, key), content)


def load_scores(folder: Path, key: str, layers: Sequence[ConvLayer]) -> Scores | None:
    """The cached scores of ``key``, or None if there are none or the file is damaged (then ranking simply runs again)."""
    path = cache_file(folder, key)
    if not path.is_file():
        return None
    try:
        content = load_torch_file(path)
        total = sum(layer.channels for layer in layers)
        tensors = {name: content[name] for name in ("correct", "margin", "slimmest", "logits", "settled")}
        if content["key"] != key or any(len(tensor) != total for tensor in tensors.values()):
            return None
        return Scores(tuple(layers), samples=int(content["samples"]), **tensors)
    except (UserError, KeyError, TypeError, ValueError):
        return None
