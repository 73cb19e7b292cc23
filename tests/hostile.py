"""A corpus of hostile inputs: each case damages a workplace (tests/conftest.py) and says what the refusal must name.

Payloads that would run leave a file ``pwned`` in the current folder. Nothing here is dangerous beyond that.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hostile_calls import CALLS
from hostile_files import (
    FILE,
    PNG,
    RECORD,
    TERA,
    TOUCH,
    Call,
    Case,
    array,
    claiming_zip,
    codec_bomb,
    edit,
    encrypted_zip,
    flip,
    integer,
    keep,
    laughs,
    legacy,
    name,
    named_zip,
    overlapping_zip,
    pickled,
    sparse,
    tar_file,
    tensor,
    text,
    torch_zip,
    write,
)
from hostile_images import (
    EPS,
    gtsrb_table,
    image,
    instead_of,
    link,
    linked_images_that_link_further,
    many_large_images,
    png,
    tiny_annotations,
    v1,
)
from PIL import EpsImagePlugin

WEIGHT = ("model", "classifier.1.weight")
ITEM = ("bd_test", "bd_data_container", "data_dict", 3)
IS_DATA = "a record may hold data only"


MACHINE: dict[str, tuple[Callable[[], bytes], str]] = {
    "protocol 4": (lambda: pickle.dumps(Call(os.system, TOUCH), 4), "posix.system"),
    "protocol 0": (lambda: pickle.dumps(Call(os.system, TOUCH), 0), "was refused"),
    "Python 2's name": (lambda: pickled(name("__builtin__", "eval"), text("open('pwned', 'w')"), b"\x85R"), "builtins.eval"),
    "INST": (lambda: pickled(b"(", text(TOUCH), b"iposix\nsystem\n"), "the instruction INST"),
    "OBJ": (lambda: pickled(b"(", name("posix", "system"), text(TOUCH), b"o"), "posix.system"),
    "EXT1": (lambda: pickled(b"\x82\x01"), "the instruction EXT1"),
    "a call of a text": (lambda: pickled(text("system"), text(TOUCH), b"\x85R"), "a call of what is no function"),
    "a call of a storage": (
        lambda: pickled(name("torch", "FloatStorage"), integer(TERA), b"\x85R"),
        "a call of what is no function",
    ),
    "attributes for a function": (
        lambda: pickled(name("torch._utils", "_rebuild_tensor_v2"), b"}", text("__code__"), b"Nsb"),
        "attributes for",
    ),
    "attributes for a dict": (lambda: pickled(b"}", b"}", b"b"), "attributes for a dict"),
    "a damaged dtype": (
        lambda: pickled(name("numpy", "dtype"), text("f8"), b"\x89\x88\x87R(K\x03", text("@"), b"NNNK\x63K\x63K\x3ftb"),
        "byte order",
    ),
    "a dtype of a gigabyte": (
        lambda: pickled(name("numpy", "dtype"), text("V1000000000"), b"\x89\x88\x87R"),
        "numpy array of V1000000000",
    ),
    "hex of hex of hex": (lambda: pickled(codec_bomb("hex_codec", 40)), "_codecs.encode to hex_codec"),
    "punycode": (
        lambda: pickled(name("_codecs", "encode"), text("\u00e9" * 10**6), text("punycode"), b"\x86R"),
        "_codecs.encode to punycode",
    ),
    "bytes of a terabyte": (lambda: pickled(name("__builtin__", "bytes"), integer(TERA), b"\x85R"), "not a whole torch file"),
    "a tuple a million deep as a key": (lambda: pickled(b"}", b")" + b"\x85" * 10**6, b"Ns"), "a tuple as the key of a dict"),
    "a large tuple as many keys": (
        lambda: pickled(b"(" + b"N" * 20000 + b"tq\x00", b"}", b"h\x00Ns" * 4000),
        "a tuple as the key of a dict",
    ),
    "a list a million deep": (lambda: pickled(b"]" * 10**6, b"a" * (10**6 - 1)), "is not an attack record"),
    "memo at two billion": (lambda: pickled(b"Nr\xff\xff\xff\x7f"), "is not an attack record"),
    "a method of a harmless class": (
        lambda: pickled(name("pathlib", "PosixPath.touch"), name("pathlib", "PosixPath"), text("pwned"), b"\x85R\x85R"),
        "pathlib.PosixPath.touch",
    ),
    "a call of a stranger's class": (lambda: pickled(name("evil", "Run"), b")R"), "evil.Run"),
    "a call of a stranger's object": (lambda: pickled(name("evil", "Run"), b")\x81", b")R"), "a call of what is no function"),
    "attributes for a stranger's class": (lambda: pickled(name("evil", "Run"), b"}b"), "attributes for a UnknownClass"),
    "an object of Popen": (lambda: pickled(name("subprocess", "Popen"), b")\x81"), "subprocess.Popen"),
    "a path of a bomb": (lambda: pickled(name("pathlib", "PosixPath"), codec_bomb("zlib_codec", 9), b"\x85R"), "zlib_codec"),
    "texts of a terabyte": (
        lambda: pickled(name("numpy", "dtype"), text("U1000000000"), b"\x89\x88\x87R"),
        "numpy array of U1000000000",
    ),
    "a text of four gigabytes": (lambda: pickled(b"X\xff\xff\xff\xff" + b"abc"), "not a whole torch file"),
    "no end": (lambda: pickled(b"N")[:-1], "not a whole torch file"),
    "an empty stack": (lambda: pickled(), "not a whole torch file"),
    "a persistent id of another kind": (lambda: pickled(text("file:///etc/passwd"), b"Q"), "an unknown kind of storage"),
    "a storage of a terabyte": (lambda: pickled(tensor(TERA, 0, [4], [1])), "claims 1000000000000 numbers"),
    "a tensor of terabytes": (lambda: pickled(tensor(4, 0, [10**4] * 3, [0] * 3)), "claims more numbers than the 4"),
    "a tensor beyond its storage": (lambda: pickled(tensor(4, 3, [4], [1])), "not a whole torch file"),
    "a tensor with an overflowing stride": (lambda: pickled(tensor(4, 0, [2, 2], [2**62, 2**62])), "not a whole torch file"),
    "a tensor of negative size": (lambda: pickled(tensor(4, 0, [-4], [1])), "a tensor without numbers"),
    "a tensor at a huge integer": (lambda: pickled(tensor(4, 2**400, [4], [1])), "not a whole torch file"),
    "an array made of a terabyte": (lambda: pickled(array(TERA, 1)), "not a whole torch file"),
    "an array told to be a terabyte": (lambda: pickled(array(0, TERA)), "not a whole torch file"),
}
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    **{f"truncated to {tenths}0 %": (keep(tenths), "not a whole torch file") for tenths in range(10)},
    "flipped in the pickle": (flip(lambda data: data.index(b"classifier.1.weight")), "not a whole torch file"),
    "flipped in the weights": (flip(lambda data: len(data) // 2), "not a whole torch file"),
    "flipped in the first header": (flip(lambda data: 0), "not a whole torch file"),
    "flipped in the directory": (flip(lambda data: data.rindex(b"PK\x01\x02") + 1), "not a whole torch file"),
    "flipped in the end": (flip(lambda data: data.rindex(b"PK\x05\x06") + 2), "not a whole torch file"),
    "random bytes": (write(lambda: bytes(range(256)) * 8), "not a whole torch file"),
    "a web page": (write(lambda: b"<!DOCTYPE html><html>404</html>"), "not a whole torch file"),
    "a pointer of git lfs": (
        write(lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "not a whole torch file",
    ),
    "a tar file": (write(tar_file), "not a whole torch file"),
    "a bare pickle": (write(lambda: pickle.dumps(Call(os.system, TOUCH), 2)), "not a whole torch file"),
    "zip-slip names": (write(named_zip("../../pwned", "/tmp/pwned", "../../../data.pkl")), "without one data.pkl"),
    "two pickles": (write(named_zip("a/data.pkl", "b/data.pkl")), "without one data.pkl"),
    "a compressed bomb": (write(lambda: torch_zip(pickled(text("a" * 2**28)), compression=zipfile.ZIP_DEFLATED)), "compressed"),
    "overlapping parts": (write(overlapping_zip), "claim more bytes than the file has"),
    "a part of four gigabytes": (write(claiming_zip), "claim more bytes than the file has"),
    "an encrypted part": (write(encrypted_zip), "not a whole torch file"),
    "an old file that calls": (write(lambda: legacy(pickle.dumps(Call(os.system, TOUCH), 2))), "since 1.6"),
    "a sparse terabyte": (sparse(2**40), "larger than 16 GiB"),
    "a pipe": (instead_of(FILE, os.mkfifo), "holds no attack_result.pt"),
    "a folder": (instead_of(FILE, Path.mkdir), "holds no attack_result.pt"),
}
CONTENTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "NaN weights": (edit(*WEIGHT, value=lambda: torch.full((10, 512, 1, 1), torch.nan)), "holds NaN"),
    "infinite weights": (edit(*WEIGHT, value=lambda: torch.full((10, 512, 1, 1), -torch.inf)), "holds NaN"),
    "weights beyond float32": (
        edit(*WEIGHT, value=lambda: torch.full((10, 512, 1, 1), 1e300, dtype=torch.float64)),
        "holds NaN",
    ),
    "integer weights": (edit(*WEIGHT, value=lambda: torch.ones(10, 512, 1, 1, dtype=torch.int64)), "wrong kind"),
    "empty weights": (edit(*WEIGHT, value=lambda: torch.empty(0)), "has shape (0,)"),
    "weights that are text": (edit(*WEIGHT, value="x" * 10**6), "holds no numbers"),
    "a negative label": (edit(*ITEM, "other_info", value=[-1, 2]), "label of bd_test is outside"),
    "a label too large": (edit(*ITEM, "other_info", value=[10, 2]), "label of bd_test is outside"),
    "a huge label": (edit(*ITEM, "other_info", value=[2**70, 2]), "not as BackdoorBench writes it"),
    "an index beyond the indicator": (edit("bd_test", "original_index_array", value=np.array([3, 99])), "outside 0..9"),
    "an index below zero": (edit("bd_test", "original_index_array", value=np.array([-3])), "outside 0..9"),
    "an indicator too short": (edit("bd_test", "poison_indicator", value=np.ones(2)), "outside 0..1"),
    "an indicator of NaN": (edit("bd_test", "poison_indicator", value=np.full(10, np.nan)), "not as BackdoorBench writes it"),
    "an indicator in two dimensions": (edit("bd_test", "poison_indicator", value=np.ones((10, 2))), "shape (10, 2)"),
    "an index beyond the test set": (v1(original_index=[3, 4000]), "test set has images 0..9"),
    "images of NaN": (v1(x=torch.full((2, 3, 32, 32), torch.nan)), "x holds NaN"),
    "images of another shape": (v1(x=torch.zeros(2, 3, 32, 31)), "x has shape"),
    "laughs for an indicator": (edit("bd_test", "poison_indicator", value=laughs()), "not as BackdoorBench writes it"),
    "laughs for images": (v1(x=laughs(), y=[0] * 10, original_targets=[1] * 10), "an image of bd_test is a list"),
    "laughs for a dataset": (edit("clean_data", value=laughs()), "names no dataset"),
    "laughs for a class count": (edit("num_classes", value=laughs()), "not as BackdoorBench writes it"),
    "laughs for a model": (edit("model", value=laughs()), "not as BackdoorBench writes it"),
    "a huge class count": (edit("num_classes", value=10**12), "num_classes is 10"),
    "a class count of a thousand digits": (edit("num_classes", value=10**4000), "num_classes is"),
    "a dataset that climbs": (edit("clean_data", value="../../etc"), "names no dataset"),
    "a name with escape codes": (edit("model_name", value="resnet\x1b[2J\nfmp: all is well"), "not one of BackdoorBench's"),
    "a name of ten megabytes": (edit("model_name", value="m" * 10**7), "not one of BackdoorBench's"),
    "a path that climbs": (edit(*ITEM, "path", value="./record/x/../../../../../../etc/passwd"), "outside its folder"),
    "a path that climbs in its last parts": (edit(*ITEM, "path", value="../../passwd"), "outside its folder"),
    "an absolute path": (edit(*ITEM, "path", value="/etc/passwd"), "outside its folder"),
    "a path with escape codes": (edit(*ITEM, "path", value="../\x1b[2J\n/../x"), "outside its folder"),
    "a path with a zero byte": (edit(*ITEM, "path", value="a/b\0.png"), "not as BackdoorBench writes it"),
    "a set for weights": (edit(*WEIGHT, value={1, 2}), "holds no numbers"),
    "a set for a size": (edit("img_size", value={1, 2, 3}), "not as BackdoorBench writes it"),
    "a complex class count": (edit("num_classes", value=10 + 0j), "not as BackdoorBench writes it"),
    "a text of numpy for a label": (edit(*ITEM, "other_info", value=[np.str_("1"), 2]), "not as BackdoorBench writes it"),
    "a path for a name": (edit("model_name", value=Path("/etc")), "model_name is a pathlib"),
    "an image of PostScript in memory": (
        v1(x=[Call(EpsImagePlugin.EpsImageFile, state=[{}, "RGB", (10**6, 10**6), None, EPS])] * 2),
        "does not fit its bytes",
    ),
    "two weights under one name": (
        edit("model", value={"w": torch.ones(1), "_orig_mod.w": torch.ones(1)}),
        "two weights that are called w",
    ),
    "a name of a million prefixes": (edit("model", value={"module." * 10**6 + "w": torch.ones(1)}), "lacks the weights"),
    "labels of another test set": (v1(original_index=[3, 4]), "only 0 are those of the clean test images"),
    "images linked to a folder of others": (link(PNG.parents[1], "/etc"), "are missing"),
    "linked images that link further": (linked_images_that_link_further, "outside its folder"),
    "images linked to themselves": (link(PNG.parents[1], PNG.parents[1].name), "BackdoorBench"),
    "an image link that leaves": (link(PNG, "/etc/passwd"), "outside its folder"),
    "a folder link that leaves": (link(PNG.parent, "/etc"), "outside its folder"),
    "a link to itself": (link(PNG, "3.png"), "not as BackdoorBench"),
    "results linked elsewhere": (
        lambda root: (root / FILE.parent / "defense").symlink_to(root / "data"),
        "leads out of the record",
    ),
    "event files linked elsewhere": (
        lambda root: (
            (root / FILE.parent / "defense" / "fmp").mkdir(parents=True),
            (root / FILE.parent / "defense" / "fmp" / "tensorboard").symlink_to(root / "data"),
        ),
        "leads out of the record",
    ),
    "a table that climbs": (gtsrb_table("../../../../../etc/passwd"), "leads out of the dataset"),
    "a table of absolute names": (gtsrb_table("/etc/passwd"), "leads out of the dataset"),
    "a table of one endless field": (gtsrb_table("x" * 2**20), "cannot be read"),
    "annotations that climb": (tiny_annotations("../../../../../etc/passwd"), "leads out of the dataset"),
    "annotations of unknown classes": (tiny_annotations("val_0.JPEG", "n\x1b[2J"), "cannot be read"),
    "many large images": (many_large_images, "more than this machine's memory"),
    "an image that is text": (image(lambda: b"no image"), "cannot be decoded"),
    "an empty image": (image(lambda: b""), "cannot be decoded"),
    "a PostScript program": (image(lambda: EPS), "cannot be decoded"),
    "a vector image": (image(lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "cannot be decoded"),
    "a decompression bomb": (image(lambda: png(12_000, 12_000, bytes(12_000 * 1501))), "has 12000x12000 pixels"),
    "an image of claims": (image(lambda: png(2**31 - 1, 2**31 - 1, b"")), "cannot be decoded"),
    "an image cut off": (image(lambda: png(2000, 2000, bytes(251) * 2000)[:300]), "cannot be decoded"),
    "an image that is a pipe": (instead_of(PNG, os.mkfifo), "are missing"),
    "an image that is a folder": (instead_of(PNG, Path.mkdir), "are missing"),
}
SETTINGS: dict[str, tuple[str, str]] = {
    "a Python call": ("eps: !!python/object/apply:os.system ['touch pwned']", "cannot be read as YAML"),
    "a Python object": ("eps: !!python/object:subprocess.Popen {}", "cannot be read as YAML"),
    "a Python name": ("eps: !!python/name:os.system", "cannot be read as YAML"),
    "laughing anchors": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)),
        "aliases",
    ),
    "an endless alias": ("eps: &a [*a]", "aliases"),
    "a merge of itself": ("a: &a\n  <<: *a", "aliases"),
    "nesting": ("eps: " + "[" * 50_000, "cannot be read as YAML"),
    "a date that is none": ("eps: 2026-99-99", "cannot be read as YAML"),
    "a megabyte": ("# " + "x" * 10**6, "larger than 256 KiB"),
    "an unknown key with escape codes": ('"\\e[2J": 1', "unknown key"),
    "a key twice": ("eps: 0.1\neps: 0.2", "the key eps stands twice"),
    "a key that is a list": ("? [a]\n: 1", "cannot be read as YAML"),
    "binary": ("eps: \x00\x01", "cannot be read as YAML"),
    "infinity": ("eps: .inf", "must be a number"),
}
SAVE_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (lambda root: (root / "out").write_text(""), "out"),
    "results linked elsewhere": (
        lambda root: (
            (root / "out" / RECORD).mkdir(parents=True),
            (root / "out" / RECORD / "defense").symlink_to(root / "data"),
        ),
        "leads out of the record",
    ),
}
INDICES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a word": (lambda file: file.write_text("1\n__import__('os')\n"), "not an index"),
    "below zero": (lambda file: file.write_text("-1\n"), "names image -1"),
    "beyond the set": (lambda file: file.write_text("1\n50\n"), "names image 50"),
    "twice": (lambda file: file.write_text("1\n1\n"), "twice"),
    "infinite": (lambda file: file.write_text("1e999\n"), "not an index"),
    "a million digits": (lambda file: file.write_text("9" * 10**6), "index"),
    "bytes": (lambda file: file.write_bytes(b"\xff\xfe\x00"), "not a text file"),
    "a sparse terabyte": (lambda file: (file.touch(), os.truncate(file, 2**40)), "larger than"),
    "an endless device": (lambda file: file.symlink_to("/dev/zero"), "is no regular file"),
    "a pipe": (os.mkfifo, "is no regular file"),
}


def corpus() -> dict[str, Case]:
    cases = {f"call: {key}": Case(edit("model", "gadget", value=make), says) for key, (make, says) in CALLS.items()}
    storages = {"0": bytes(16)}
    for key, (make, says) in MACHINE.items():
        cases[f"pickle: {key}"] = Case(write(lambda make=make: torch_zip(make(), storages)), says)
    cases |= {f"file: {key}": Case(*rest) for key, rest in FILES.items()}
    cases |= {f"record: {key}": Case(*rest) for key, rest in CONTENTS.items()}
    for key, (yaml, says) in SETTINGS.items():
        cases[f"settings: {key}"] = Case(
            lambda root, yaml=yaml: (root / "bad.yaml").write_text(yaml), says, ("--yaml_path", "bad.yaml")
        )
    for key, (make, says) in SAVE_FOLDERS.items():
        cases[f"save_folder: {key}"] = Case(make, says, ("--save_folder", "out"))
    for key, (make, says) in INDICES.items():
        cases[f"index: {key}"] = Case(lambda root, make=make: make(root / "bad.txt"), says, ("--index", "bad.txt"))
    return cases
