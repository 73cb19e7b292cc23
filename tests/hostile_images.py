"""Hostile images, folders of images and tables."""

from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile_files import FILE, PNG, content_of, edit
from PIL import Image


def png(width: int, height: int, data: bytes, extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def image(make: Callable[[], bytes]) -> Callable[[Path], object]:
    return lambda root: (root / PNG).write_bytes(make())


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n(%pipe%touch pwned) (w) file closefile\n%%EOF\n"


def instead_of(path: Path, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(root: Path) -> None:
        target = root / path
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        make(target)

    return damage


def link(path: Path, to: str) -> Callable[[Path], object]:
    return instead_of(path, lambda target: target.symlink_to(to))


def many_large_images(root: Path) -> None:
    """4096x4096 images of a dataset of folders; 20 000 entries name the same small file."""
    content = content_of(root)
    items = content["bd_test"]["bd_data_container"]["data_dict"]
    content["bd_test"]["bd_data_container"]["data_dict"] = dict.fromkeys(range(20_000), items[3])
    content["bd_test"]["poison_indicator"] = np.ones(20_000)
    content["bd_test"]["original_index_array"] = np.arange(20_000)
    content.update(clean_data="toys", img_size=(4096, 4096, 3))
    torch.save(content, root / FILE)
    for part in ("train", "test"):
        for label in range(10):
            file = root / "data" / "toys" / part / str(label) / "a.png"
            file.parent.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(file)


def gtsrb_table(file: str) -> Callable[[Path], object]:
    """A record of traffic signs, and a training table that names ``file``."""

    def damage(root: Path) -> None:
        edit("clean_data", value="gtsrb")(root)
        table = root / "data" / "gtsrb" / "Train" / "00000" / "GT-00000.csv"
        table.parent.mkdir(parents=True)
        table.write_text(f"Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n{file};9;9;1;1;9;9;0\n")

    return damage


def tiny_annotations(file: str, label: str = "n0") -> Callable[[Path], object]:
    """A record of Tiny ImageNet as it is unpacked, and annotations of ``val/images``."""

    def damage(root: Path) -> None:
        edit("clean_data", value="tiny-imagenet-200")(root)
        base = root / "data" / "tiny-imagenet-200"
        for place in ("train/n0/images", "train/n1/images", "val/images"):
            (base / place).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(base / place / "val_0.JPEG")
        (base / "val" / "val_annotations.txt").write_text(f"{file}\t{label}\t0\t0\t9\t9\n")

    return damage


def linked_images_that_link_further(root: Path) -> None:
    images = root / PNG.parents[1]
    images.rename(root / "disk")
    images.symlink_to(root / "disk")
    (root / "disk" / "3" / "3.png").unlink()
    (root / "disk" / "3" / "3.png").symlink_to("/etc/passwd")


def v1(**changes: Any) -> Callable[[Path], object]:
    state = {"x": torch.zeros(2, 3, 32, 32), "y": [0, 0], "original_targets": [1, 2], **changes}
    return edit("bd_test", value=state)
