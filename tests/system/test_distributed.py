"""Several processes rank to the bits of one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fmp_core.errors import UserError
from fmp_core.system import distributed
from fmp_core.system.devices import Device

WORKER = """
import json, torch
from fmp_core.frg import racing
from fmp_core.frg.reverse import FrgSettings
from fmp_core.frg.scorer import Batching, FeatureMapScorer
from fmp_core.inversion.search import TriggerSearch
from fmp_core.models.feature_maps import trace_conv_layers
from fmp_core.system import distributed
from torch import nn
torch.set_num_threads(1)
distributed.join("cpu")
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Conv2d(7, 10, 3, 2), nn.Flatten(), nn.LazyLinear(4))
images, labels = torch.rand(20, 3, 10, 10), torch.randint(4, (20,))
net(images)
layers = trace_conv_layers(net, images[:1])
scorer = FeatureMapScorer(net, layers, images, labels, FrgSettings(0.1), batching=Batching(rows=16))
whole = scorer.score()
racing.CALIBRATION_MAPS = 3
raced, error = racing.predict_scores(scorer, 4, "layer")
search = TriggerSearch(net, layers, (255 * images).to(torch.uint8), labels, torch.float32, 0)
flip_rates = search.test("dense-32", 4).flip_rates
agreed = [distributed.all_agree(True), distributed.all_agree(not distributed.is_leader())]  # the first process never does
share = distributed.total(6.0) / (torch.distributed.get_world_size() if distributed.is_distributed() else 1)
if distributed.is_leader():
    told = [(scores.correct, scores.margin, scores.smallest_margin) for scores in (whole, raced)]
    scored = [[value.hex() for values in told_of for value in values.double().tolist()] for told_of in told]
    print(json.dumps([*scored, error.tolist(), flip_rates.tolist(), agreed, share]))
distributed.leave()
"""


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2] / 'defense')!r})\n{WORKER}")
    return path


def run(*command: str) -> list:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_cluster_that_sets_only_some_variables_is_no_torchrun(monkeypatch: pytest.MonkeyPatch):
    for name in distributed.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    alone = Device(torch.device("cpu"))
    assert distributed.join("cpu") == alone and not distributed.is_distributed()
    monkeypatch.setenv("WORLD_SIZE", "1")  # left by a notebook's cell, or torchrun with one process
    for name in {*distributed.TORCHRUN} - {"WORLD_SIZE"}:
        monkeypatch.setenv(name, "0")
    assert distributed.join("cpu") == alone and not distributed.is_distributed()


@pytest.mark.parametrize(("named", "taken"), [("cuda", 1), ("cuda:3,2", 2)])
def test_processes_take_the_gpus_that_are_named(named: str, taken: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    for name in distributed.TORCHRUN:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    chosen: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    tried: list[int] = []
    monkeypatch.setattr(distributed, "fault_of_gpu", lambda index: tried.append(index) or "")
    assert distributed.join(named).device == torch.device("cuda", taken) == chosen[0]
    assert tried == [taken]  # a process on the others' GPUs would take memory there
    monkeypatch.setattr(distributed, "fault_of_gpu", lambda index: "no kernel image is available")
    with pytest.raises(UserError, match=rf"--device {named}: cuda:{taken} does not compute \(no kernel image is available\)"):
        distributed.join(named)
    with pytest.raises(UserError, match="give --nproc_per_node=1"):
        distributed.join("cuda:3")


def test_processes_on_different_hardware_work_in_one_precision(tmp_path: Path):
    """Of two, one could do with bfloat16 what the other could not: each would wait for what the other does not send."""
    (tmp_path / "worker.py").write_text(
        f"import json, os, sys; sys.path.insert(0, {str(Path(__file__).parents[2] / 'defense')!r})\n"
        "import torch\n"
        "from fmp_core.system import devices, distributed\n"
        "torch.backends.cpu.get_cpu_capability = lambda: 'AVX2' if os.environ.get('RANK') == '1' else 'AVX512'\n"
        "devices._cpu_has = lambda feature: True\n"
        "cpu = torch.device('cpu')\n"
        "before = devices.has_fast_bfloat16(cpu)\n"
        "distributed.join('cpu')\n"
        "if distributed.is_leader(): print(json.dumps([before, devices.has_fast_bfloat16(cpu)]))\n"
        "distributed.leave()\n"
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert run(*torchrun, str(tmp_path / "worker.py")) == [True, False]
    assert run(str(tmp_path / "worker.py")) == [True, True]


def test_two_processes_score_to_the_bits_of_one(worker: Path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    assert run(*torchrun, str(worker)) == run(str(worker))
