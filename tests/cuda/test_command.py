"""The commands with ``--device cuda:0``: every way to select and to repair, the scripts, caches across devices, torchrun."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ablate
import bench_frg
import make_record
import pandas as pd
import pytest
import report
import sweep
import torch
import torch.distributed as dist
from conftest import RECORD, Ran, call_fmp
from fmp_core.benchmark import measure
from fmp_core.inversion import trigger, verdict
from fmp_core.settings import PROJECT
from toy import needs_cuda

pytestmark = [pytest.mark.cuda, needs_cuda]
RESULTS = Path("record") / RECORD / "defense" / "fmp"
FEW = ["--frg_samples", "2", "--p", "8", "--ratio", "1", "--epochs", "1", "--batch_size", "25"]
CUDA = ["--device", "cuda:0"]
PATHS = {
    "paper": [],
    "strong": ["--preset", "strong"],
    "bf16": ["--dtype", "bf16"],
    "fp32": ["--dtype", "fp32", "--amp", "False"],
    "racing": ["--ranking", "racing", "--dtype", "fp32"],
    "global": ["--scope", "global"],
    "steps": ["--frg_steps", "2"],
    "random": ["--selection", "random"],
    "none": ["--selection", "none"],
    "chunk": ["--chunk", "1"],
    "memory": ["--memory", "64"],
    "masked": ["--masked", "True", "--epochs", "2"],
    "saving": ["--frequency_save", "1", "--frequency_test", "1", "--report", "True"],
}


def call(*flags: str, device: str = "cuda:0") -> Ran:
    return call_fmp("--result_file", RECORD, *FEW, "--device", device, "--report", "False", *flags)


@pytest.fixture
def short_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps of trigger inversion, whose verdict on random weights is "backdoored", so that all of ``strong`` runs."""
    for name, fewer in (("STEPS", 2), ("SPARSE_BATCH", 8), ("DENSE_BATCH", 8)):
        monkeypatch.setattr(trigger, name, fewer)
    monkeypatch.setattr(verdict, "LEAST_HELD_OUT", 0)
    monkeypatch.setattr(verdict, "LEAST_MARGIN", -1.0)


@pytest.mark.usefixtures("short_search")
@pytest.mark.parametrize("path", PATHS)
def test_every_path_ends_with_results_that_any_machine_reads(path: str, workplace: Path) -> None:
    ran = call(*PATHS[path])
    assert ran.code == 0, ran.err
    metrics = json.loads((RESULTS / "metrics.json").read_text())
    assert metrics["device"].startswith("cuda:0")
    pruned = {"none": 0}.get(path)
    assert metrics["pruned"] == pruned if pruned is not None else metrics["pruned"] > 0
    saved = torch.load(RESULTS / "defense_result.pt", weights_only=False)  # no map_location: as on a machine without CUDA
    assert {value.device.type for value in saved["model"].values()} == {"cpu"}
    assert not list(RESULTS.rglob("interrupted.pt")) and not list(RESULTS.rglob("ranking_*"))


def test_selection_and_scores_are_the_cpus(workplace: Path) -> None:
    tables = {}
    for device in ("cpu", "cuda:0"):
        assert call("--dtype", "fp32", "--epochs", "0", "--defense_name", device[:4], device=device).code == 0
        tables[device] = pd.read_csv(RESULTS.with_name(device[:4]) / "feature_maps.csv")
    cpu, cuda = tables.values()
    assert (cpu["correct"] == cuda["correct"]).mean() > 0.95
    assert (cpu["margin"] - cuda["margin"]).abs().median() < 1e-2
    assert (cpu["pruned"] == cuda["pruned"]).mean() > 0.95


def test_scores_of_one_device_are_not_taken_for_anothers_and_both_are_kept(workplace: Path) -> None:
    """They may differ where scores nearly tie, so the device is part of the key."""
    flags = ["--dtype", "fp32", "--epochs", "0"]
    for device in ("cuda:0", "cpu"):
        assert "ranking" in json.loads(_metrics(call(*flags, device=device)))["seconds"]
    cache = sorted((RESULTS / "cache").glob("scores_*.pt"))
    assert len(cache) == 2
    for device in ("cuda:0", "cpu"):
        assert "ranking" not in json.loads(_metrics(call(*flags, device=device)))["seconds"]
    for file in cache:
        content = torch.load(file, weights_only=True)
        assert all(value.device.type == "cpu" for value in content.values() if isinstance(value, torch.Tensor))


def _metrics(ran: Ran) -> str:
    assert ran.code == 0, ran.err
    return (RESULTS / "metrics.json").read_text()


def test_two_runs_write_the_same_bits(workplace: Path) -> None:
    for name in ("one", "two"):
        assert call("--defense_name", name, "--save_folder", name).code == 0
    one, two = (next(Path(name).rglob("feature_maps.csv")).parent for name in ("one", "two"))
    assert (one / "feature_maps.csv").read_bytes() == (two / "feature_maps.csv").read_bytes()
    first, second = (torch.load(folder / "defense_result.pt", weights_only=False)["model"] for folder in (one, two))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.usefixtures("short_search")
def test_ablation_and_report(workplace: Path) -> None:
    rows = ["ft", "layer", "oracle", "strong"]
    assert ablate.main(["--result_file", RECORD, "--rows", *rows, "--csv", "rows.csv", *FEW, *CUDA]) == 0
    assert list(pd.read_csv("rows.csv")["row"]) == ["(attacked)", *rows]
    for device in ("cuda:0", "cpu"):  # what was computed on a GPU is reported on any machine
        name = ["--result_file", RECORD, "--defense_name", "ablate-layer", "--compare", "ablate-ft", "ablate-strong"]
        assert report.main([*name, "--device", device]) == 0


def test_a_record_made_on_cuda_is_defended_there_and_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--model", "squeezenet1_0", "--limit_train", "40", "--epochs", "1", "--patch_size", "6"]
    assert make_record.main([*small, "--quiet", *CUDA]) == 0
    record = Path("record") / "badnet_digits"
    content = torch.load(record / "attack_result.pt", weights_only=False)
    assert {value.device.type for value in content["model"].values()} == {"cpu"}
    Path("s.yaml").write_text(
        "records: [badnet_digits]\ndefenses: [fmp]\ndevice: 'cuda:0'\n"
        "ours: {selection: random, epochs: 1, test_images: 16, report: false}\n"
    )
    assert sweep.main(["s.yaml"]) == 0
    assert json.loads(next(record.rglob("metrics.json")).read_text())["device"].startswith("cuda:0")


def test_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "CEILING_BATCHES", {"cuda": (4,)})
    monkeypatch.setattr(measure, "TRAINING_IMAGES", {"cuda": 8})
    flags = ["--model", "squeezenet1_0", "--images", "2", "--maps", "26", "--against", "released", "--training"]
    assert bench_frg.main([*flags, *CUDA, "--dtype", "fp32", "--csv", str(tmp_path / "frg.csv")]) == 0
    table = pd.read_csv(tmp_path / "frg.csv").set_index("figure")["value"]
    assert table["efficiency"] > 0 and table["finetune_efficiency"] > 0


needs_nccl = pytest.mark.skipif(not dist.is_nccl_available(), reason="this torch has no NCCL")


@needs_nccl
def test_nccl_gives_one_process_back_what_is_its_own(tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(PROJECT / 'defense')!r})\n"
        "import torch, torch.distributed as dist\n"
        "from fmp_core.system import distributed\n"
        f"dist.init_process_group('nccl', init_method='file://{tmp_path}/meet', rank=0, world_size=1)\n"
        "scores, least = (torch.arange(4.0, dtype=torch.float64, device='cuda') for _ in range(2))\n"
        "distributed.combine(scores, least=least)\n"
        "assert scores.tolist() == least.tolist() == [0, 1, 2, 3]\n"
        "assert distributed.all_agree(True) and not distributed.all_agree(False) and distributed.total(1.5) == 1.5\n"
        "print('done', flush=True)\n"
        "distributed.leave(failed='failed' in sys.argv)\n"
    )
    for how, code in (("whole", 0), ("failed", 2)):
        (tmp_path / "meet").unlink(missing_ok=True)
        ran = subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True, timeout=600)
        assert (ran.returncode, ran.stdout) == (code, "done\n"), ran.stderr


@needs_nccl
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_under_torchrun_select_the_same(real_workplace_template: Path, tmp_path: Path) -> None:
    root = tmp_path / "workplace"
    shutil.copytree(real_workplace_template, root)
    flags = [str(PROJECT / "defense" / "fmp.py"), "--result_file", RECORD, *FEW, "--report", "False", "--defense_name"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, start, device in (("one", [], "cuda:0"), ("two", torchrun, "cuda")):
        command = [sys.executable, *start, *flags, name, "--device", device]
        ran = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=1800)
        assert ran.returncode == 0, ran.stderr
    one, two = ((root / RESULTS).with_name(name) / "feature_maps.csv" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
