"""Small checkouts in BackdoorBench's layout (its own code cannot be shipped), and what a folder holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fmp_core.backdoorbench.install import fingerprint

Tree = Callable[[Path], dict[str, str | None]]


@pytest.fixture(scope="session")
def workplace_template(real_workplace_template: Path) -> Path:
    """BackdoorBench's own processes read the record."""
    return real_workplace_template


# Does what BackdoorBench's scripts do with paths and old names; none of its code.
SCRIPT = """
import argparse, os, sys
import numpy as np, torch
from settings import NAME  # beside config/, found through the current folder
from tabulate import tabulate
parser = argparse.ArgumentParser()
for flag in ("dataset", "model", "result_file", "device", "index", "checkpoint_save", "fail"):
    parser.add_argument("--" + flag)
parser.add_argument("--num_workers", type=float)
args = parser.parse_args()
assert "PYTHONPATH" not in os.environ  # FMP's modules would be found in place of BackdoorBench's
assert os.environ["CUDA_VISIBLE_DEVICES"] == ""  # some scripts use a GPU whatever --device says
list(torch.utils.data.DataLoader([1, 2], num_workers=args.num_workers or 0))
path = f"record/{args.result_file}/attack_result.pt"
content = torch.load(path)
real = os.path.realpath(path)
data = real[:real.index("record")] + content["data_path"][content["data_path"].index("data"):]
assert os.path.isfile(data + "/cifar-10-batches-py/test_batch"), data
items = content["bd_test"]["bd_data_container"]["data_dict"].values()
assert items and all(os.path.isfile(item["path"]) for item in items)
assert np.infty == np.inf and np.float is float
assert np.asarray([[1], [1, 2]]).shape == np.array([np.zeros(2), np.zeros(3)]).shape == (2,)
assert torch.zeros_like(torch.ones(2), device="cuda").to("cuda:0").cuda().device.type == "cpu"
assert "0.5" in tabulate([{"loss": 0.5}], headers="keys", tablefmt="github", floatfmt=".5f").split("\\n")[2]
assert iter(torch.utils.data.DataLoader([1, 2])).next() == 1
assert open("./config/defense/echo.yaml").read() == "x"
assert not args.index or os.path.isfile(args.index)
open("stray.txt", "w").close()  # into the temporary folder
if args.checkpoint_save:
    open(args.checkpoint_save + "model.pt", "w").close()
print("ran with", args.dataset, args.model, NAME)
if args.fail:
    raise Exception(args.fail)
torch.save({"model": {}}, f"record/{args.result_file}/defense/echo/defense_result.pt")
"""

ANALYSIS = """
import os, sys
print(*sys.argv)
folder = "record/" + sys.argv[sys.argv.index("--result_file_defense") + 1]
os.makedirs(folder + "/visual", exist_ok=True)
open(folder + "/visual/plot.png", "w").close()
"""

# Names its process and that of a child of its own in a file, and sleeps; stands for a defense and for what the probe imports.
SLEEPER = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)"])
with open(os.environ["PIDS"] + ".part", "w") as file:
    file.write(f"{os.getpid()} {child.pid} {os.getcwd()}")
os.rename(os.environ["PIDS"] + ".part", os.environ["PIDS"])
time.sleep(900)
"""

KNOWN = """
if dataset_name == "cifar10":
    pass
elif dataset_name == 'a_forks_own':
    pass
"""


# BackdoorBench's reader as far as the shims know it, with test sets of 10 clean and 9 poisoned "images".
READER = """
import numpy as np
class Poisoned:
    def __init__(self):
        self.rows = np.arange(9)
    def __len__(self):
        return len(self.rows)
    def subset(self, rows):
        self.rows = self.rows[rows]
class Wrapper:
    def __init__(self, wrapped_dataset):
        self.wrapped_dataset = wrapped_dataset
    def __getattr__(self, name):  # as BackdoorBench's: torch must not find __getitems__ behind it
        return getattr(self.wrapped_dataset, name)
    def __getitem__(self, row):
        return 100 + self.wrapped_dataset[row]
    def __len__(self):
        return len(self.wrapped_dataset)
def load_attack_result(path):
    return {"clean_test": Wrapper([*range(10)]), "bd_test": Wrapper(Poisoned())}
"""
# "Defends" by giving the record's own model back, all of whose weights a flag may replace.
COUNTER = """
import argparse, torch
from utils.save_load_attack import load_attack_result
parser = argparse.ArgumentParser()
for flag in ("dataset", "model", "result_file", "device", "keep"):
    parser.add_argument("--" + flag)
args = parser.parse_args()
path = f"record/{args.result_file}/attack_result.pt"
found = load_attack_result(path)
clean = torch.utils.data.DataLoader(found["clean_test"], batch_size=3)
print("tests on", [int(one) - 100 for batch in clean for one in batch], found["bd_test"].wrapped_dataset.rows.tolist())
content = {"model": torch.load(path)["model"]} if args.keep == "yes" else {}
torch.save(content, f"record/{args.result_file}/defense/counter/defense_result.pt")
with open(f"record/{args.result_file}/defense/counter/counter_df_summary.csv", "w") as file:
    file.write(",test_acc,test_asr,test_ra\\nlast,0.5,0.5,0.5\\n")
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "BackdoorBench"
    for name, text in {
        "defense/__init__.py": "",
        "defense/base.py": "class defense:\n    pass\n",
        "defense/echo.py": SCRIPT,
        "defense/sleeper.py": SLEEPER,
        "defense/counter.py": COUNTER,
        "utils/save_load_attack.py": READER,
        "utils/aggregate_block/dataset_and_transform_generate.py": SLEEPER + KNOWN,
        "analysis/visual_names.py": ANALYSIS,
        "config/defense/echo.yaml": "x",
        "settings.py": "NAME = 'a name'",
        "record/other/attack_result.pt": "",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def tree() -> Tree:
    """``tree(root)``: every path below ``root`` but git's own, with its content."""

    def look(root: Path) -> dict[str, str | None]:
        paths = (path for path in sorted(root.rglob("*")) if ".git" not in path.parts)
        return {path.relative_to(root).as_posix(): fingerprint(path) for path in paths}

    return look
