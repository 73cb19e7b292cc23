"""Scores and verdicts kept beside the results, so that runs which differ only in later settings rank once.

A file is named by a digest of everything its content depends on: weights, images, labels, settings, library versions, and the
source code of the algorithm.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fmp_core import frg, inversion, models
from fmp_core.data import clean_subset
from fmp_core.errors import UserError
from fmp_core.frg.scores import Scores
from fmp_core.inversion.search import TriggerSearch
from fmp_core.inversion.trigger import FAMILIES
from fmp_core.inversion.verdict import Verdict
from fmp_core.models.feature_maps import ConvLayer
from fmp_core.storage.checkpoint import content_key
from fmp_core.storage.files import write_text, write_torch
from fmp_core.storage.torch_file import load_torch_file
from fmp_core.system import devices, distributed
from fmp_core.system.versions import source_digest

SCORES_MODULES = (frg, models, devices, distributed)  # the code that scores depend on
VERDICT_MODULES = (inversion, models, clean_subset, devices, distributed)
SCORES_CODE, VERDICT_CODE = source_digest(*SCORES_MODULES), source_digest(*VERDICT_MODULES)


def score_key(model: torch.nn.Module, images: Tensor, labels: Tensor, settings: dict[str, object]) -> str:
    """What FRG scores depend on; ``settings`` in plain values."""
    return content_key(_tensors(model), images, labels, {**settings, **_kernels(images.device), "code": SCORES_CODE})


def verdict_key(search: TriggerSearch, num_classes: int) -> str:
    """What the verdicts of ``search`` depend on."""
    about = {"seed": search.seed, "dtype": str(search.dtype), "classes": num_classes, "families": FAMILIES}
    about |= {**_kernels(search.images.device), "code": VERDICT_CODE}
    return content_key(_tensors(search.model), search.images, search.labels, about)


def _kernels(device: torch.device) -> dict[str, object]:
    """What decides which kernels compute, and so how results are rounded: the hardware, and on a CPU also the number of
    threads, among which kernels share their sums."""
    found: dict[str, object] = {"fast bfloat16": devices.has_fast_bfloat16(device)}
    if device.type == "cpu":
        instructions = torch.backends.cpu.get_cpu_capability()
        return found | {"threads": torch.get_num_threads(), "instructions": instructions, "AMX": devices.has_amx()}
    return found | {"GPU": torch.cuda.get_device_name(device)}


def _tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Weights and all buffers: the normalisation, too, which is not part of a state_dict."""
    return {**model.state_dict(), **dict(model.named_buffers())}


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
    """The cached scores of ``key``; None if there are none or the file is damaged (then the maps are ranked again)."""
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


def verdict_file(folder: Path, key: str) -> Path:
    """Where the verdicts of ``key`` lie below the result folder."""
    return folder / "cache" / f"verdict_{key[:16]}.json"


def save_verdicts(folder: Path, key: str, verdicts: Sequence[Verdict]) -> None:
    """Write the verdicts of several families, whole or not at all."""
    rates = {verdict.family: verdict.flip_rates.tolist() for verdict in verdicts}
    held_out = min((verdict.held_out for verdict in verdicts), default=0)
    write_text(verdict_file(folder, key), json.dumps({"key": key, "held_out": held_out, "flip_rates": rates}))


def load_verdicts(folder: Path, key: str, num_classes: int) -> dict[str, Verdict]:
    """The cached verdicts of ``key`` by family; none if the file is absent or damaged (then triggers are inverted again)."""
    try:
        content = json.loads(verdict_file(folder, key).read_text(encoding="utf-8"))
        if content["key"] != key:
            return {}
        held_out = int(content["held_out"])
        rates = {str(name): torch.tensor(values, dtype=torch.float64) for name, values in content["flip_rates"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    good = all(values.shape == (num_classes + 1,) and bool(((values >= 0) & (values <= 1)).all()) for values in rates.values())
    return {name: Verdict(name, values, held_out) for name, values in rates.items()} if good else {}
