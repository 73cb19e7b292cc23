#!/usr/bin/env python3
"""Run a script of BackdoorBench on today's Python, torch and numpy; no file of BackdoorBench is touched.

    python shims.py SCRIPT [ARGUMENTS...]

The current folder is BackdoorBench's root. What newer libraries took away is put back in this process, then SCRIPT runs as if
Python had been given it. BackdoorBench may have a Python of its own, so this keeps to Python 3.8, and to files of FMP that
import torch alone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.machinery
import importlib.util
import multiprocessing
import os
import runpy
import sys
import types
from typing import Any

FACTORIES = (
    *("zeros", "ones", "full", "empty", "rand", "randn", "randint", "arange", "eye", "tensor", "as_tensor", "linspace"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
)
TEST_IMAGES, DTYPE = "FMP_TEST_IMAGES", "FMP_DTYPE"  # environment variables; run.py sets them
COUNTS = {"--num_workers", "--num_workers_semi", "--u_num"}


def _file_of_fmp(path: str) -> Any:
    """The module in the file ``path``, relative to this one. BackdoorBench's Python knows no package of ours."""
    file = os.path.join(os.path.dirname(os.path.abspath(__file__)), path)
    spec = importlib.util.spec_from_file_location(os.path.basename(path)[:-3], file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


optional = _file_of_fmp("optional_packages.py")
names = _file_of_fmp(os.path.join(os.pardir, "data", "names.py"))


def apply(root: str) -> str:
    """Put back what is missing; returns what was done, in words. ``root`` is the folder of BackdoorBench's files."""
    done = [*_numpy(root), *_torch(root), *_torch_without_cuda(), *_one_pixel(), _images(), _whole_numbers()]
    done += [*_workers(), *_stand_ins(), *_own_imports()]
    sys.meta_path.append(optional.Placeholders(root))
    return "; ".join([*done, *_saved_by_nc(), *_fewer_test_images(), *_autocast()])


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def _numpy(root: str) -> list[str]:
    """numpy 1.24 and 2.0 dropped aliases of plain Python and numpy objects. numpy 1.24 refuses rows of unequal length, of which
    it used to make an array of objects; for BackdoorBench it does again."""
    import numpy as np

    def forgiving(function):  # type: ignore[no-untyped-def]
        def call(rows, dtype=None, *args, **kwargs):  # type: ignore[no-untyped-def]
            try:
                return function(rows, dtype, *args, **kwargs)
            except ValueError as error:
                if dtype is None and "inhomogeneous" in str(error) and optional.is_below(root, sys._getframe(1)):
                    return function(rows, object, *args, **kwargs)
                raise

        return call

    for name in ("array", "asarray"):
        setattr(np, name, forgiving(getattr(np, name)))
    aliases = {"infty": np.inf, "Inf": np.inf, "NaN": np.nan, "float": float, "int": int, "object": object, "complex": complex}
    missing = [name for name in aliases if name not in vars(np)]
    for name in missing:
        setattr(np, name, aliases[name])
    return ["arrays of unequal rows", *(f"np.{name}" for name in missing)]


def _torch(root: str) -> list[str]:
    import torchvision.datasets.celeba
    import torchvision.datasets.cifar
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    _file_of_fmp("loading.py").begin(root)
    # torch 1.13 dropped iter(loader).next(), which bnp calls.
    _BaseDataLoaderIter.next = _BaseDataLoaderIter.__next__  # type: ignore[attr-defined]
    # torchvision downloads a dataset again if a file's md5 is not the original's; here a file that exists is taken as it is.
    for dataset in (torchvision.datasets.cifar, torchvision.datasets.celeba):
        setattr(dataset, "check_integrity", lambda path, md5=None: os.path.isfile(path))  # noqa: B010
    return ["torch.load reads whole pickles of this run", "iter(loader).next()", "datasets are read whatever their md5"]


def _torch_without_cuda() -> list[str]:
    """Some scripts name CUDA whatever ``--device`` says; without a GPU those calls mean the CPU."""
    import torch

    if torch.cuda.is_available():
        return []

    def on_cpu(value: object) -> object:
        is_device = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
        return torch.device("cpu") if is_device else value

    def without_cuda(function):  # type: ignore[no-untyped-def]
        return lambda *args, **kwargs: function(*map(on_cpu, args), **{key: on_cpu(value) for key, value in kwargs.items()})

    for name in FACTORIES:
        setattr(torch, name, without_cuda(getattr(torch, name)))
    for kind in (torch.Tensor, torch.nn.Module):
        setattr(kind, "to", without_cuda(kind.to))  # noqa: B010 - assigning to a method is what mypy forbids
        setattr(kind, "cuda", lambda self, *args, **kwargs: self)  # noqa: B010
    torch.cuda.Stream = lambda *args, **kwargs: None  # type: ignore[assignment,misc]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment,return-value]
    torch.cuda.current_stream = lambda *args: types.SimpleNamespace(wait_stream=lambda stream: None)  # type: ignore[assignment]
    return ["CUDA calls mean the CPU"]


def _one_pixel() -> list[str]:
    """On CPUs the weight gradients of convolutions over one pixel take up to half of the training time of resnet18 at 32x32."""
    import torch.overrides

    if torch.cuda.is_available() or not hasattr(torch.overrides, "TorchFunctionMode"):  # the latter before torch 1.13
        return []
    _file_of_fmp(os.path.join(os.pardir, "models", "one_pixel.py")).OnePixelConvolutions().__enter__()
    return ["convolutions over one pixel are matrix products on CPUs"]


def _images() -> str:
    """The poisoned images are a stranger's files, and Pillow starts programs to read some formats (EPS)."""
    from PIL import Image

    Image.init()
    for name in set(Image.OPEN).difference(names.IMAGE_FORMATS):
        del Image.OPEN[name]
    Image.ID[:] = [name for name in Image.ID if name in Image.OPEN]
    return "images are " + ", ".join(names.IMAGE_FORMATS)


def _workers() -> list[str]:
    """Workers of a DataLoader must be copies of this process: others (macOS; Linux since Python 3.14) have nothing of what is
    put right here, and cannot unpickle BackdoorBench's dataset."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return []
    multiprocessing.set_start_method("fork", force=True)
    return ["workers are forked"]


def _whole_numbers() -> str:
    """BackdoorBench reads counts as decimal numbers, which torch and numpy refuse as counts: its YAML files' 4 works, but not
    ``--num_workers 4``."""
    add = argparse.ArgumentParser.add_argument

    def add_argument(self, *names, **kwargs):  # type: ignore[no-untyped-def]
        if COUNTS.intersection(names) and kwargs.get("type") is float:
            kwargs["type"] = int
        return add(self, *names, **kwargs)

    argparse.ArgumentParser.add_argument = add_argument  # type: ignore[method-assign]
    return "whole numbers for " + ", ".join(sorted(COUNTS))


def _stand_ins() -> list[str]:
    """setuptools 82 dropped pkg_resources, of which pytorch_wavelets uses one function. tabulate is in nobody's requirements;
    dbd and nab write their log's tables with it, which pandas can do as well."""
    import pandas as pd

    def resource_stream(package: str, name: str) -> object:
        folder = os.path.dirname(str(sys.modules[package.partition(".")[0]].__file__))
        return open(os.path.join(folder, *package.split(".")[1:-1], name), "rb")

    def tabulate(table: object, *_: object, **__: object) -> str:
        head, *rows = pd.DataFrame(table).to_string(index=False).splitlines()  # type: ignore[call-overload]
        return "\n".join([head, "-" * len(head), *rows])  # BackdoorBench takes the third line for the first row

    done = []
    for name, function in (("pkg_resources", resource_stream), ("tabulate", tabulate)):
        if not _exists(name):
            module = sys.modules[name] = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)  # packages that look for this one read it
            setattr(module, function.__name__, function)
            done.append(f"a stand-in for {name}")
    return done


def _own_imports() -> list[str]:
    """What BackdoorBench's files ask of one another and do not get, whatever the versions: networks of bnp and ep import a
    folder by the name it once had, and nab expects three values of a function that returns only the first."""
    done = []
    for folder in ("mbns", "dde"):
        if _exists(f"utils.defense_utils.{folder}") and not _exists(f"defense.{folder}"):
            sys.modules[f"defense.{folder}"] = importlib.import_module(f"utils.defense_utils.{folder}")
            done.append(f"defense.{folder}")
    if os.path.basename(sys.argv[0]) == "nab.py" and _exists("utils.defense_utils.dbd.utils_db.setup"):
        setup = importlib.import_module("utils.defense_utils.dbd.utils_db.setup")
        load = setup.load_config

        def load_config(path: str) -> object:
            found = load(path)
            return (found, "", "") if isinstance(found, dict) else found

        setup.load_config = load_config  # type: ignore[attr-defined]
        done.append("nab's load_config")
    return done


def _fewer_test_images() -> list[str]:
    """Defenses test after each epoch, or each pruned share, which on a CPU takes longer than all else."""
    count = int(os.environ.get(TEST_IMAGES, "0"))
    if not count:
        return []
    records = importlib.import_module("utils.save_load_attack")
    load = records.load_attack_result

    def load_attack_result(path: str) -> dict[str, Any]:
        found: dict[str, Any] = load(path)
        if "clean_test" not in found:  # of a defense, which ft-sam may begin with
            return found
        for name in ("clean_test", "bd_test"):
            whole = found[name].wrapped_dataset
            size = min(count, len(whole))
            rows = [number * len(whole) // size for number in range(size)]
            if hasattr(whole, "subset"):
                whole.subset(rows)
            else:
                found[name].wrapped_dataset = _Rows(whole, rows)
        return found

    records.load_attack_result = load_attack_result  # type: ignore[attr-defined]
    return [f"tests on {count} images"]


def _autocast() -> list[str]:
    """Mixed precision where ``run_defense.py --dtype bf16`` is asked for."""
    if os.environ.get(DTYPE) != "bf16":
        return []
    _file_of_fmp("bf16.py").begin()
    return ["bf16 autocast"]


def _saved_by_nc() -> list[str]:
    """nc trains one model and saves another, which is still the attacked one; here it saves the one it trained."""
    if os.path.basename(sys.argv[0]) != "nc.py":
        return []
    trainer = importlib.import_module("utils.trainer_cls").PureCleanModelTrainer
    records = importlib.import_module("utils.save_load_attack")
    train, save = trainer.train_with_test_each_epoch_on_mix, records.save_defense_result
    trained: list[Any] = []

    def train_and_note(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        trained.append(self.model)
        return train(self, *args, **kwargs)

    def save_trained(**kwargs):  # type: ignore[no-untyped-def]
        return save(**{**kwargs, "model": trained[-1].cpu().state_dict()} if trained else kwargs)

    trainer.train_with_test_each_epoch_on_mix = train_and_note
    records.save_defense_result = save_trained  # type: ignore[attr-defined]
    return ["nc saves the model it trains"]


class _Rows:
    """Some rows of a dataset. torch's Subset will not do: it also answers for whole batches, and BackdoorBench's wrapper, which
    passes that on, then has no chance to transform the images."""

    def __init__(self, whole: Any, rows: list[int]):
        self.whole, self.rows = whole, rows

    def __getitem__(self, row: int) -> Any:
        return self.whole[self.rows[row]]

    def __len__(self) -> int:
        return len(self.rows)


def main() -> None:
    """Run BackdoorBench's script that the command line names, with today's libraries adapted."""
    script, root = sys.argv[1], os.getcwd()
    sys.argv = sys.argv[1:]
    if absent := optional.absent(script):
        pip_names = " ".join(optional.PIP_NAMES[name] for name in absent)
        sys.exit(f"{script}: error: it uses {', '.join(absent)}, not installed here: pip install {pip_names}")
    # As if Python had been given the script. BackdoorBench's utils, models and dataset are namespace packages, over which
    # installed packages of these names would win if the root came last, where BackdoorBench puts it.
    sys.path[:1] = [os.path.dirname(os.path.abspath(script)), root]
    print(f"shims: {apply(root)}", flush=True)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
