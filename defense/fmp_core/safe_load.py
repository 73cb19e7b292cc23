"""Reading torch files from strangers: tensors and plain data come out, nothing is executed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .errors import UserError
from .numpy_pickles import NUMPY_GLOBALS


class PickledImage:
    """Stands where a pickle names a PIL image: it keeps the state and runs none of Pillow while the file is read."""

    def __setstate__(self, state: list[Any]) -> None:
        self.state = state

    def decode(self) -> Image.Image:
        """The image. Raises ValueError if the state is not that of a whole RGB or grey image."""
        _, mode, size, _, data = self.state[:5]
        channels = {"L": 1, "RGB": 3}.get(mode)
        if channels is None or len(data) != size[0] * size[1] * channels:
            raise ValueError(f"a pickled image of mode {mode} and size {size} does not fit its {len(data)} bytes")
        return Image.frombytes(mode, tuple(size), bytes(data))


def _no_bytes() -> bytes:
    """Python 3 writes ``b""`` in protocol 2 as a call of bytes(); with an argument that call could claim any memory."""
    return b""


_DTYPES = sorted({type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}, key=lambda kind: kind.__name__)
_ALLOWED: list[Any] = [
    *((obj, f"{module}.{name}") for (module, name), obj in NUMPY_GLOBALS.items()),
    *_DTYPES,
    (_no_bytes, "builtins.bytes"),
    (PickledImage, "PIL.Image.Image"),
    (PickledImage, "PIL.PngImagePlugin.PngImageFile"),
]


def load_torch_file(path: Path) -> Any:
    """``torch.load`` onto the CPU with ``weights_only=True`` and a narrow allow-list: numpy arrays, PIL images as data.

    Raises:
        UserError: missing, truncated or damaged, or asks for a global outside the list (named).
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; check --result_file and --record_root.")
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen unrelated types for a bad file
        refused = re.search(r"[Uu]nsupported (?:global: GLOBAL|GLOBAL|class) (\S+)", str(error))
        if refused:
            name = refused[1].rstrip(".")
            raise UserError(
                f"{path} was refused: its pickle asks for {name}, and a record may hold data only; do not trust this file."
            ) from None
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(
            f"{path} is not a whole torch file ({lines[0][:200].rstrip('.')}); it may be truncated: copy it again."
        ) from None
