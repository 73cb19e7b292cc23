"""Datasets written as BackdoorBench keeps them."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CIFAR = (32, 32, 3)


def random_pixels(count: int, seed: int = 0, shape: tuple[int, ...] = (3, 32, 32)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_pickle(path: Path, content: Any, protocol: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol=protocol))


def write_cifar10(root: Path, images: np.ndarray, labels: list[int]) -> Path:
    """``images`` in six batches, the last of them the test batch; returns the folder of batches."""
    folder = root / "cifar10" / "cifar-10-batches-py"
    size = len(labels) // 6
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = slice(number * size, (number + 1) * size)
        write_pickle(folder / name, {"data": images[rows].reshape(size, -1), "labels": labels[rows]})
    return folder


def write_mnist(root: Path, images: np.ndarray, labels: list[int], parts: tuple[str, ...] = ("train", "t10k")) -> Path:
    """The same images as each of ``parts``; returns the folder of files."""
    raw = root / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part in parts:
        sizes = struct.pack(">iiii", 0x803, *images.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(sizes + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, len(labels)) + bytes(labels))
    return raw


def python2_batch(images: np.ndarray, label_key: bytes, labels: list[int]) -> bytes:
    """A batch as Python 2's cPickle (protocol 2) wrote the originals: byte strings, numpy 1 names."""

    def text(content: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(content)) + content

    rows = images.reshape(len(labels), -1)
    dtype = (
        b"cnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    shape = b"(" + b"".join(b"M" + struct.pack("<H", n) for n in rows.shape) + b"t"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
    array = empty + b"(K\x01" + shape + dtype + b"\x89" + text(rows.tobytes()) + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(label_key) + numbers + text(b"batch_label") + text(b"test \xe9") + b"u."


def save_image(path: Path, colour: int, size: tuple[int, int] = (32, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 255 - colour, 7)).save(path)
