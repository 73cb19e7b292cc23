"""scikit-learn's digits as an image folder: the dataset that needs no download."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

from PIL import Image

from fmp_core.storage.files import make_folders

SIZE = (32, 32, 3)
TEST_SHARE = 0.25


def make_digits(folder: Path) -> None:
    """Lay the 1797 digits out as ``train|test/<class>/<index>.png``, 32x32 RGB, unless ``folder`` is there."""
    if folder.is_dir():
        return
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = list(range(len(digits.target)))
    random.Random(0).shuffle(order)
    tests = int(len(order) * TEST_SHARE)
    make_folders(folder.parent)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    unfinished.chmod(0o755)  # mkdtemp's is for its owner only
    try:
        for position, index in enumerate(order):
            file = unfinished / ("test" if position < tests else "train") / str(digits.target[index]) / f"{index:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            grey = Image.fromarray((digits.images[index] / 16 * 255).round().astype("uint8"))
            grey.resize(SIZE[:2], Image.Resampling.BILINEAR).convert("RGB").save(file)
        unfinished.rename(folder)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not (isinstance(error, OSError) and folder.is_dir()):  # else another process was first
            raise
