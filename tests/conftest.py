"""Fixtures: a workplace (dataset and attack record in a temporary current folder) and the command run inside it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core, so one thread each; before torch reads it
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from colours import build_colours, run_colours
from fmp_core import command
from fmp_core.data.write_record import AttackedModel, PoisonedImages, write_attack_record
from fmp_core.models.build import build_model
from narrow_resnet import NARROW_RESNET
from small_record import write_small_record

RECORD = "badnet_tiny"
MODEL = NARROW_RESNET  # known to processes that import ``toy``
REAL_MODEL = "squeezenet1_0"  # the cheapest of BackdoorBench's models at 32x32: 0.7 million weights, 2976 feature maps


class Ran(NamedTuple):
    """What a command left: its exit code, and all it printed."""

    code: int
    out: str
    err: str


def call_fmp(*flags: str) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = command.main(list(flags))
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


def poisoned(images: torch.Tensor, labels: torch.Tensor, indices: list[int], target: int = 0) -> PoisonedImages:
    """A white corner on images ``indices``, uint8 ``[N, C, H, W]``."""
    triggered = images[indices].clone()
    triggered[:, :, -3:, -3:] = 255
    return PoisonedImages(len(images), indices, triggered, [target] * len(indices), labels[indices].tolist())


def build_workplace(root: Path, model: str = MODEL, batch_size: int = 10) -> None:
    """``record/badnet_tiny`` with random weights, and ``data/cifar10`` of random images: 5 training batches, 1 test batch."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (6 * batch_size, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(6 * batch_size) % 10
    batches = root / "data" / "cifar10" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = slice(batch_size * number, batch_size * (number + 1))
        batch = {"data": images[rows].reshape(batch_size, -1), "labels": labels[rows].tolist()}
        (batches / name).write_bytes(pickle.dumps(batch, protocol=2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_model(model, 10)
    pixels, targets = torch.from_numpy(images), torch.from_numpy(labels)
    training = 5 * batch_size
    write_attack_record(
        root / "record" / RECORD,
        name=RECORD,
        model=AttackedModel(model, 10, network.state_dict()),
        dataset="cifar10",
        bd_train=poisoned(pixels[:training], targets[:training], [3, 11, 20, 27, 42]),
        bd_test=poisoned(pixels[training:], targets[training:], list(range(1, 10))),
    )


@pytest.fixture(scope="session")
def workplace_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed; its record's model is known to this process only. ``real_workplace_template`` for others."""
    root = tmp_path_factory.mktemp("template")
    build_workplace(root)
    return root


@pytest.fixture(scope="session")
def real_workplace_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a model of BackdoorBench's; a folder's conftest.py or a module may make it its ``workplace_template``."""
    root = tmp_path_factory.mktemp("real_template")
    build_workplace(root, REAL_MODEL)
    return root


@pytest.fixture
def workplace(workplace_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh current folder that holds ``data/cifar10`` and ``record/badnet_tiny``."""
    root = tmp_path / "workplace"
    shutil.copytree(workplace_template, root)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def tiny_record(workplace: Path) -> Path:
    """The record's folder in a fresh workplace."""
    return workplace / "record" / RECORD


@pytest.fixture
def run_fmp(workplace: Path) -> Callable[..., Ran]:
    """``run_fmp("--p", "8", ...)`` is the command in a fresh workplace, in this process, on the CPU, without a report."""
    return lambda *flags: call_fmp("--device", "cpu", "--report", "False", *flags)


@pytest.fixture
def edit_record() -> Callable[[Path, Callable[[dict[str, Any]], Any]], None]:
    """``edit_record(folder, change)`` rewrites ``attack_result.pt`` after ``change(content)``."""

    def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        content = torch.load(folder / "attack_result.pt", weights_only=False)  # our own file
        change(content)
        torch.save(content, folder / "attack_result.pt")

    return edit


@pytest.fixture(autouse=True)
def quiet_logger() -> Iterator[None]:
    """A run adds handlers to the package's logger; the next test must not log into a closed stream."""
    logger = logging.getLogger("fmp_core")
    yield
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True  # else pytest adds handlers of its own


@pytest.fixture(scope="session")
def colours_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    build_colours(root)
    return root


@pytest.fixture(scope="session")
def colours_run(colours_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one run."""
    root = tmp_path_factory.mktemp("base") / "here"
    shutil.copytree(colours_template, root)
    return run_colours(root)


@pytest.fixture
def colours(colours_template: Path, tmp_path: Path) -> Path:
    shutil.copytree(colours_template, tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """A record of four triggered 4x4 images; its weights belong to no model."""
    return write_small_record(tmp_path / "record" / "mine")
