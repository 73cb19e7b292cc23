"""State that survives a kill, and keys that name all a result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmp_core import __version__
from fmp_core.errors import UserError
from fmp_core.storage.files import write_torch
from fmp_core.storage.torch_file import load_torch_file
from fmp_core.system.devices import to_host

MOST_VALUES = 1000  # of one setting


@dataclass
class Checkpoint:
    """A file with the state of unfinished work, such as a training after its last finished epoch.

    ``made_with`` names, in plain values, all that the result depends on; a file made with other values is refused.
    ``notes`` is the caller's own plain data (its history of epochs, say): saved with the state and given back with it.
    """

    path: Path
    made_with: dict[str, Any]
    notes: dict[str, Any] = field(default_factory=dict)

    def load(self) -> dict[str, Any] | None:
        """The saved state; None without a file. Raises UserError if it is damaged or was made with other settings (named)."""
        if not self.path.is_file():
            return None
        try:
            content = load_torch_file(self.path)
        except UserError as error:
            raise UserError(f"{str(error).rstrip('.')}, or remove it to start again.") from None
        parts = {"made_with", "notes", "state"}
        whole = isinstance(content, dict) and set(content) == parts and all(isinstance(content[part], dict) for part in parts)
        if not (whole and all(map(_is_plain, content["made_with"].values()))):
            raise UserError(f"{self.path} is not a checkpoint of FMP; remove it to start again.")
        then, now = content["made_with"], self.made_with
        both = [(key, then.get(key), now.get(key)) for key in {**then, **now}]
        other = [f"{key} {str(old)[:200]} (now {new})" for key, old, new in both if old != new]
        if other:
            raise UserError(
                f"{self.path} was made with {', '.join(other)}; give those settings again, or start again with --fresh."
            )
        self.notes = content["notes"]
        return content["state"]

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file, whole or not at all."""
        write_torch(self.path, {"made_with": self.made_with, "notes": self.notes, "state": state})

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _is_plain(value: Any) -> bool:
    """Whether a value of a setting is what settings are: a stranger's file may hold what takes hours to compare or to print."""
    single = (str, int, float, type(None))
    return isinstance(value, single) or (
        type(value) in (list, tuple) and len(value) <= MOST_VALUES and all(isinstance(part, single) for part in value)
    )


def content_key(state: Mapping[str, Tensor], images: Tensor, labels: Tensor, settings: Mapping[str, Any]) -> str:
    """SHA-256 over weights, images, labels, settings and the library versions that decide rounding."""
    digest = hashlib.sha256()
    about = {**settings, "fmp": __version__, "torch": torch.__version__, "device": images.device.type}
    digest.update(json.dumps(about, sort_keys=True).encode())
    tensors = {**state, "images": images, "labels": labels}
    for name, tensor in zip(tensors, to_host(tensors.values()), strict=True):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
