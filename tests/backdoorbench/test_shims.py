"""What the shims put right in BackdoorBench's process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fmp_core.backdoorbench import shims
from PIL import Image

BACKSTOP = 900


def test_nc_saves_the_model_it_trains(tmp_path: Path) -> None:
    """BackdoorBench's nc trains one copy of the attacked model and saves another."""
    files = {
        "utils/trainer_cls.py": "class PureCleanModelTrainer:\n"
        "    def __init__(self, model): self.model = model\n"
        "    def train_with_test_each_epoch_on_mix(self, step): self.model.weight.data += step\n",
        "utils/save_load_attack.py": "import torch\ndef save_defense_result(model, save_path): torch.save(model, save_path)\n",
        "nc.py": "import sys, torch\n"
        "from utils.trainer_cls import PureCleanModelTrainer\n"
        "from utils.save_load_attack import save_defense_result\n"
        "first, second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)\n"
        "second.load_state_dict(first.state_dict())\n"
        "if sys.argv[1] == 'train': PureCleanModelTrainer(first).train_with_test_each_epoch_on_mix(step=1)\n"
        "save_defense_result(model=second.cpu().state_dict(), save_path=sys.argv[2])\n"
        "torch.save(second.state_dict(), sys.argv[3])\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for what, step in (("train", 1), ("stay", 0)):
        command = [sys.executable, str(shims.__file__), "nc.py", what, "saved.pt", "attacked.pt"]
        done = subprocess.run(command, cwd=tmp_path, timeout=BACKSTOP, capture_output=True, text=True)
        assert done.returncode == 0 and "nc saves the model it trains" in done.stdout, done.stderr
        saved, attacked = (torch.load(tmp_path / name)["weight"] for name in ("saved.pt", "attacked.pt"))
        assert torch.equal(saved, attacked + step)


def test_placeholders_and_ragged_arrays_are_for_backdoorbench_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shims.optional.PIP_NAMES, "absent_package", "absent-package")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, shims.optional.Placeholders(str(tmp_path))])
    use = "import absent_package.part as part\nfrom absent_package import thing\n"
    with pytest.raises(ModuleNotFoundError):
        exec(compile(use, "/elsewhere/library.py", "exec"), {})
    names: dict[str, object] = {}
    exec(compile(use, str(tmp_path / "utils.py"), "exec"), names)
    for call in ("thing()", "part.resize(1)", "thing.attribute"):
        with pytest.raises(ImportError, match="pip install absent-package"):
            exec(call, names)
    for name in ("absent_package", "absent_package.part"):
        sys.modules.pop(name, None)
    import numpy as np

    for name in ("array", "asarray"):
        monkeypatch.setattr(np, name, getattr(np, name))  # to be put back
    shims._numpy(str(tmp_path))
    ragged = "import numpy as np\nrows = np.asarray([[1], [1, 2]])\n"
    with pytest.raises(ValueError, match="inhomogeneous"):
        exec(compile(ragged, "/elsewhere/library.py", "exec"), {})
    exec(compile(ragged, str(tmp_path / "utils.py"), "exec"), names)
    assert isinstance(names["rows"], np.ndarray) and names["rows"].dtype == object


def test_what_a_script_will_use_is_missed_before_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shims.optional.PIP_NAMES, "absent_package", "absent-package")
    (tmp_path / "uses.py").write_text("from absent_package import thing as it\nprint('ran')\nif False: it()\n")
    (tmp_path / "imports.py").write_text("import json, absent_package.part\nprint('ran', json.dumps(1))\n")
    monkeypatch.chdir(tmp_path)
    assert shims.optional.absent("imports.py") == [] and shims.optional.absent("uses.py") == ["absent_package"]
    monkeypatch.setattr(sys, "argv", ["shims.py", "uses.py"])
    with pytest.raises(
        SystemExit, match=r"uses\.py: error: it uses absent_package, not installed here: pip install absent-package"
    ):
        shims.main()


def test_convolutions_over_one_pixel_are_products_in_backdoorbench_too(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import torch\nprint(torch.nn.Conv2d(4, 4, 3, padding=1)(torch.rand(2, 4, 1, 1)).grad_fn.name())\n"
    )
    command, environment = [sys.executable, str(shims.__file__), "script.py"], {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "UnsqueezeBackward0"


def test_bf16_is_for_products_only_and_sees_each_step_of_the_optimizer(tmp_path: Path) -> None:
    """Autocast keeps copies of weights until its context is left, which here is never; and BackdoorBench opens contexts too."""
    (tmp_path / "script.py").write_text(
        "import torch\n"
        "layer = torch.nn.Linear(2, 1)\n"
        "optimizer = torch.optim.SGD(layer.parameters(), lr=1)\n"
        "for _ in range(2):\n"
        "    with torch.cuda.amp.autocast(enabled=True):\n"
        "        torch.nn.init.zeros_(layer.bias)\n"
        "        out = layer(torch.ones(1, 2))\n"
        "    out.sum().backward()\n"
        "    optimizer.step()\n"
        "    torch.nn.init.ones_(layer.weight)\n"
        "print(out.dtype, out.detach().numpy().item(), layer.weight.dtype)\n"
    )
    command = [sys.executable, str(shims.__file__), "script.py"]
    for dtype in ("bf16", "fp32"):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", shims.DTYPE: dtype}
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=BACKSTOP)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.splitlines()[-1] == f"torch.{'bfloat16' if dtype == 'bf16' else 'float32'} 2.0 torch.float32"
        assert ("bf16 autocast" in ran.stdout) == (dtype == "bf16")


def test_losses_in_bf16_are_as_on_cuda(tmp_path: Path) -> None:
    """Of a probability of bfloat16 close to 1 nothing is left, and sau's model was NaN after one step."""
    (tmp_path / "script.py").write_text(
        "import torch\n"
        "import torch.nn.functional as F\n"
        "layer = torch.nn.Linear(2, 2)\n"
        "torch.nn.init.constant_(layer.bias, 0)\n"
        "with torch.no_grad():\n"
        "    layer.weight.copy_(torch.eye(2))\n"
        "logits = layer(torch.tensor([[10.0, 0.0]]))\n"
        "likely = F.softmax(logits, dim=1)[0, 0]\n"
        "loss = -torch.log(1 - likely)\n"
        "loss.backward()\n"
        "losses = F.cross_entropy(logits, torch.tensor([1])), logits.norm(), (logits**2).mean(), logits.sum()\n"
        "print(logits.dtype, *{part.dtype for part in losses}, round(loss.item()), layer.weight.grad.isfinite().all().item())\n"
    )
    command = [sys.executable, str(shims.__file__), "script.py"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", shims.DTYPE: "bf16"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=BACKSTOP)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "torch.bfloat16 torch.float32 10 True"


def test_no_program_is_started_to_read_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Pillow starts Ghostscript for files that begin like EPS, whatever their names."""
    (tmp_path / "script.py").write_text(
        "from PIL import Image\nprint(Image.open('png.png').size)\nImage.open('eps.png').load()\n"
    )
    Image.new("RGB", (3, 2)).save(tmp_path / "png.png")
    (tmp_path / "eps.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    command = [sys.executable, str(shims.__file__), "script.py"]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=BACKSTOP)
    assert "(3, 2)" in ran.stdout and "UnidentifiedImageError" in ran.stderr
    assert not (tmp_path / "started").exists()
