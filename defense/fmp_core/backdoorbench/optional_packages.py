"""Packages that BackdoorBench imports at the top of files which mostly do without them. Loaded by ``shims.py``."""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types

PIP_NAMES = {
    **{name: name for name in ("kornia", "pytorch_wavelets", "imageio", "seaborn", "scipy")},
    **{"cv2": "opencv-python-headless", "umap": "umap-learn", "sklearn": "scikit-learn", "skimage": "scikit-image"},
}


def is_below(root: str, frame: types.FrameType) -> bool:
    """Whether the code of ``frame`` is BackdoorBench's."""
    return os.path.abspath(frame.f_code.co_filename).startswith(os.path.join(root, ""))


def absent(script: str) -> list[str]:
    """The packages that the code of ``script`` itself uses and that are not installed.

    What it uses last may be what hours of computing were for: nc needs cv2 when it has found a backdoor.
    """
    with open(script, encoding="utf-8", errors="replace") as file:
        nodes = list(ast.walk(ast.parse(file.read())))
    packages = {}  # by the name that the script calls it
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                package = ((node.module if isinstance(node, ast.ImportFrom) else alias.name) or "").partition(".")[0]
                packages[alias.asname or alias.name.partition(".")[0]] = package
    used = {packages[node.id] for node in nodes if isinstance(node, ast.Name) and node.id in packages}
    return sorted(package for package in used & set(PIP_NAMES) if importlib.util.find_spec(package) is None)


class Placeholders(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets BackdoorBench's files import an absent optional package; the first use of it says what to install.

    Only for files below ``root``: other packages probe for optional ones and must learn that they are absent.
    """

    def __init__(self, root: str):
        self.root = root

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name.partition(".")[0] not in PIP_NAMES:
            return None
        frame = sys._getframe(1)
        while frame.f_back is not None and ("importlib" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
            frame = frame.f_back
        if not is_below(self.root, frame):
            return None
        print(f"shims: {name} is not installed; a placeholder stands in.", flush=True)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: types.ModuleType) -> None:
        package = module.__name__.partition(".")[0]

        class Absent(type):
            def __getattr__(cls, name: str) -> object:
                raise ImportError(f"BackdoorBench needs {package} here: pip install {PIP_NAMES[package]}")

            def __call__(cls, *args: object, **kwargs: object) -> object:
                return cls.anything

        def anything(name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            return Absent(name, (), {})

        module.__getattr__ = anything  # type: ignore[method-assign]
