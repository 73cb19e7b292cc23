"""Scores and evidence kept beside the result, named by what they depend on, so that sweeps over p or fine-tuning rank once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmp_core import __version__
from fmp_core.errors import UserError
from fmp_core.frg.scorer import Scores
from fmp_core.inversion.verdict import Evidence
from fmp_core.models.feature_maps import ConvLayer
from fmp_core.storage.files import write_text, write_torch
from fmp_core.storage.torch_file import load_torch_file


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
        "smallest_margin": scores.smallest_margin,
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
        real, whole = torch.float64, torch.int64
        kinds = {"correct": whole, "margin": real, "smallest_margin": real, "settled": torch.bool}
        tensors = {name: content[name] for name in kinds}
        if content["key"] != key or any(tensors[name].dtype != kind for name, kind in kinds.items()):
            return None
        if any(tensor.shape != (total,) for tensor in tensors.values()):
            return None
        return Scores(tuple(layers), samples=int(content["samples"]), **tensors)
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return None


def evidence_file(folder: Path, key: str) -> Path:
    """Where the evidence of ``key`` lies below the result folder."""
    return folder / "cache" / f"evidence_{key[:16]}.json"


def save_evidence(folder: Path, key: str, found: Sequence[Evidence]) -> None:
    """Write the evidence of several families, whole or not at all."""
    shares = {evidence.family: evidence.success.tolist() for evidence in found}
    held_out = min((evidence.held_out for evidence in found), default=0)
    write_text(evidence_file(folder, key), json.dumps({"key": key, "held_out": held_out, "success": shares}))


def load_evidence(folder: Path, key: str, classes: int) -> dict[str, Evidence]:
    """The cached evidence of ``key`` by family; none if the file is absent or damaged (then triggers are reversed again)."""
    try:
        content = json.loads(evidence_file(folder, key).read_text(encoding="utf-8"))
        if content["key"] != key:
            return {}
        held_out = int(content["held_out"])
        found = {str(name): torch.tensor(shares, dtype=torch.float64) for name, shares in content["success"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    good = all(shares.shape == (classes,) and bool(((shares >= 0) & (shares <= 1)).all()) for shares in found.values())
    return {name: Evidence(name, shares, held_out) for name, shares in found.items()} if good else {}
