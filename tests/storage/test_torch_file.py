"""A torch file from a stranger is data: nothing in it runs, and refusals say what it asked for."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fmp_core.errors import UserError
from fmp_core.storage.placeholders import Opaque, PickledImage
from fmp_core.storage.torch_file import load_torch_file
from PIL import Image
from torch.serialization import get_safe_globals


class Call:
    """Pickles as a call of ``function(*arguments)``, which plain unpickling performs."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def name_of(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def make_file(path: Path) -> Any:
    """Calls that leave a file at ``path`` when they run."""
    return [
        (os.system, Call(os.system, f"touch {path}")),
        (eval, Call(eval, f"open({str(path)!r}, 'w').close()")),
        (exec, Call(exec, f"open({str(path)!r}, 'w').close()")),
        (os.mkdir, Call(os.mkdir, str(path))),
        (np.savetxt, Call(np.savetxt, str(path), [1.0])),
        (Image.new, Call(Image.new, "RGB", (2, 2))),
    ]


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "bare": lambda call: call,
    "value": lambda call: {"model": call},
    "key": lambda call: {"bd_test": {"data": [({"deep": (call,)},)]}},
    "beside tensors": lambda call: collections.OrderedDict(a=torch.ones(2), b=[np.arange(3), call]),
}


def random_image(mode: str, size: tuple[int, int] = (5, 3)) -> Image.Image:
    channels = 1 if mode == "L" else 3
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze() if channels == 1 else pixels)


def reloaded(folder: Path, obj: Any, **options: Any) -> Any:
    torch.save(obj, folder / "a.pt", **options)
    return load_torch_file(folder / "a.pt")


def test_plain_data_tensors_and_arrays_come_back(tmp_path: Path):
    content = {
        "text": "é",
        "numbers": (1, 2.5, True, None),
        np.int64(7): b"bytes",
        "tensor": torch.arange(6, dtype=torch.float16).view(2, 3),
        "model": collections.OrderedDict(w=torch.ones(2)),
    }
    loaded = reloaded(tmp_path, content)
    assert loaded["text"] == "é" and loaded["numbers"] == (1, 2.5, True, None) and loaded[7] == b"bytes"
    assert torch.equal(loaded["tensor"], content["tensor"]) and loaded["tensor"].dtype == torch.float16
    assert list(loaded["model"]) == ["w"]


@pytest.mark.parametrize("kind", ["bool", "uint8", "int16", "int32", "int64", "float16", "float32", "float64"])
def test_numpy_arrays_and_scalars_come_back(kind: str, tmp_path: Path):
    array = np.array([[0, 1], [3, 2]]).astype(kind)
    loaded, scalar = reloaded(tmp_path, [array, array[1, 0]])
    assert loaded.dtype == array.dtype and np.array_equal(loaded, array)
    assert scalar == array[1, 0] and scalar.dtype == array.dtype


def test_empty_arrays_come_back(tmp_path: Path):
    assert reloaded(tmp_path, [np.zeros(0)])[0].shape == (0,)


def test_files_before_torch_1_6_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"no zip file, as torch writes them since 1\.6"):
        reloaded(tmp_path, {"x": torch.arange(3)}, _use_new_zipfile_serialization=False)


class Args:
    """A class of somebody's script."""


def jpeg() -> Image.Image:
    buffer = io.BytesIO()
    random_image("RGB").save(buffer, "JPEG")
    return Image.open(buffer)


HARMLESS: dict[str, Callable[[], Any]] = {
    "device": lambda: torch.device("cpu"),
    "dtype": lambda: torch.float32,
    "set": lambda: {1, 2},
    "frozenset": lambda: frozenset({1}),
    "complex": lambda: 1 + 2j,
    "namespace": lambda: argparse.Namespace(x=1),
    "path": lambda: Path("a"),
    "defaultdict": lambda: collections.defaultdict(list, {1: [2]}),
    "tuple key": lambda: {(1, "a"): 3},
    "array of texts": lambda: np.array(["a", "bc"]),
    "numpy text": lambda: np.str_("a"),
    "args": Args,
    "class": lambda: Args,
    "date": lambda: datetime.datetime(2026, 1, 1),
    "jpeg": jpeg,
    "palette": lambda: Image.new("P", (2, 2)),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", HARMLESS)
def test_harmless_values_do_not_hinder_the_rest(kind: str, protocol: int, tmp_path: Path):
    """They come as placeholders that hold nothing; what lies beside them is read."""
    torch.save(
        {"odd": HARMLESS[kind](), "list": [HARMLESS[kind]()] * 2, "x": torch.ones(2)},
        tmp_path / "a.pt",
        pickle_protocol=protocol,
    )
    loaded = load_torch_file(tmp_path / "a.pt")
    assert loaded["x"].tolist() == [1, 1] and len(loaded["list"]) == 2
    odd = loaded["odd"]
    odd = next(iter(odd)) if kind == "tuple key" else odd
    assert isinstance(odd, (Opaque, PickledImage)) or (kind == "array of texts" and odd.size == 0)


def test_a_state_dict_keeps_the_versions_of_its_modules(tmp_path: Path):
    state = torch.nn.Sequential(torch.nn.BatchNorm2d(2)).state_dict()
    assert vars(reloaded(tmp_path, {"model": state})["model"]) == vars(state)


def test_only_what_is_dangerous_is_called_so(tmp_path: Path):
    torch.save({"model": {"w": torch.nn.Linear(2, 2)}}, tmp_path / "a.pt")
    with pytest.raises(
        UserError,
        match=r"Linear \(under 'w'\), which is not plain data\.",
    ):
        load_torch_file(tmp_path / "a.pt")


@pytest.mark.parametrize("wrapping", WRAPPED)
@pytest.mark.parametrize("number", [0, 4, 5])
def test_a_call_is_refused_by_name_and_not_made(wrapping: str, number: int, tmp_path: Path):
    trace = tmp_path / "trace"
    function, call = make_file(trace)[number]
    torch.save(WRAPPED[wrapping](call), tmp_path / "a.pt")
    if function is not Image.new:
        torch.load(tmp_path / "a.pt", weights_only=False)
        assert trace.exists(), "the attack itself must work, or this test proves nothing"
        trace.rmdir() if trace.is_dir() else trace.unlink()
    with pytest.raises(UserError) as caught:
        load_torch_file(tmp_path / "a.pt")
    under = {"value": " (under 'model')", "key": " (under 'deep')", "beside tensors": " (under 'b')"}.get(wrapping, "")
    assert f"asks for {name_of(function)}{under}, and a record may hold data only; do not trust" in str(caught.value)
    assert str(tmp_path / "a.pt") in str(caught.value) and "\n" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_bare_pickle_is_refused_and_not_run(protocol: int, tmp_path: Path):
    trace = tmp_path / "trace"
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Call(os.system, f"touch {trace}"), protocol=protocol))
    with pytest.raises(UserError, match=r"a\.pt"):
        load_torch_file(tmp_path / "a.pt")
    assert not trace.exists()


def test_a_class_of_the_package_itself_is_refused(tmp_path: Path):
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"asks for torch\.nn\.modules\.linear\.Linear"):
        load_torch_file(tmp_path / "a.pt")


def test_nothing_is_added_to_torchs_own_list(tmp_path: Path):
    reloaded(tmp_path, [1])
    assert not any(PickledImage in (entry if isinstance(entry, tuple) else (entry,)) for entry in get_safe_globals())
    torch.save([random_image("RGB")], tmp_path / "a.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "a.pt", weights_only=True)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.6, 0.95, 0.999])
def test_a_truncated_file_is_called_truncated(share: float, tmp_path: Path):
    torch.save({"a": torch.arange(10_000), "b": torch.ones(5000)}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"a\.pt is not a whole torch file .*truncated") as caught:
        load_torch_file(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)


def test_any_other_file_is_refused(tmp_path: Path):
    (tmp_path / "a.pt").write_bytes(os.urandom(2000))
    with pytest.raises(UserError, match="not a whole torch file"):
        load_torch_file(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("a.txt", "no pickle")
    with pytest.raises(UserError, match="not a whole torch file"):
        load_torch_file(tmp_path / "b.pt")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"gone\.pt does not exist"):
        load_torch_file(tmp_path / "gone.pt")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pillows_images_come_back_as_data(mode: str, tmp_path: Path):
    image = random_image(mode)
    loaded = reloaded(tmp_path, [image])[0]
    assert isinstance(loaded, PickledImage)
    assert np.array_equal(np.asarray(loaded.decode()), np.asarray(image))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pillows_png_files_come_back_as_data(mode: str, tmp_path: Path):
    random_image(mode).save(tmp_path / "a.png", dpi=(72, 72))
    image = Image.open(tmp_path / "a.png")
    image.load()
    assert type(image).__name__ == "PngImageFile"
    loaded = reloaded(tmp_path, [image])[0]
    assert isinstance(loaded, PickledImage)
    assert np.array_equal(np.asarray(loaded.decode()), np.asarray(random_image(mode)))


@pytest.mark.parametrize("length", [0, 44, 46, 15])
def test_an_image_whose_bytes_do_not_fill_it_is_refused(length: int):
    image = PickledImage()
    image.build([{}, "RGB", (5, 3), None, bytes(length)])
    with pytest.raises(ValueError, match="does not fit"):
        image.decode()


@pytest.mark.parametrize("mode", ["P", "RGBA", "1", "F", "nonsense", None])
def test_an_image_of_another_mode_is_refused(mode: Any):
    image = PickledImage()
    image.build([{}, mode, (5, 3), None, bytes(45)])
    with pytest.raises(ValueError, match="of mode"):
        image.decode()


@pytest.mark.parametrize("state", [[], [{}], [{}, "RGB", (5, 3)]])
def test_an_image_without_its_state_is_refused(state: list[Any]):
    image = PickledImage()
    image.build(state)
    with pytest.raises(ValueError):
        image.decode()


def test_an_image_of_negative_size_is_refused():
    image = PickledImage()
    image.build([{}, "L", (-5, -3), None, bytes(15)])
    with pytest.raises(ValueError):
        image.decode()
