"""Result files as BackdoorBench and this program write them, and what tests read from their tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from fmp_core.results.tables import Table

T5 = "clean_test_loss_avg_over_batch,bd_test_loss_avg_over_batch,test_acc,test_asr,test_ra"


def three_rows(acc: float, asr: float, ra: float, head: str = "epoch,batch,train_epoch_loss_avg_over_batch,train_acc") -> str:
    """BB's summary: the last values, the largest, and whether NaN occurred."""
    some = ",".join("1" for _ in head.split(",")) + "," if head else ""
    no = ",".join(["False"] * (some.count(",") + 5))
    lead = f"{head}," if head else ""
    return f",{lead}{T5}\nlast,{some}1.5,nan_value,{acc},{asr},{ra}\nvalid_max,{some}9,,1.0,1.0,1.0\nexist_nan_value,{no}\n"


def one_row(acc: float, asr: float, ra: float) -> str:
    return f",{T5}\n0,1.5,2.5,{acc},{asr},{ra}\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def metrics_json(acc: float, asr: float, ra: float, seed: int = 0, before_acc: float = 0.9, **more: Any) -> str:
    after = {"test_acc": acc, "test_asr": asr, "test_ra": ra}
    before = {"test_acc": before_acc, "test_asr": 0.985, "test_ra": 0.0}
    content = {"dataset": "cifar10", "model": "preactresnet18", "seed": seed, "settings": {"ratio": 0.1}}
    return json.dumps({"after": after, "before": before, **content, **more})


def tidy(root: Path) -> pd.DataFrame:
    return pd.read_csv(root / "out.csv")


def marked(table: Table) -> set[tuple[str, str]]:
    """(method, metric) of the cells that are the best of their column."""
    best = table.best()
    return {(method, metric) for method in best.index for attack, metric in best.columns if best.loc[method, (attack, metric)]}


def frame_of(*rows: tuple[str, str, str, float]) -> pd.DataFrame:
    """Tidy rows of (record, attack, method, accuracy)."""
    columns = ["record", "attack", "method", "test_acc"]
    rest = {"test_asr": 0.5, "test_ra": 0.5, "der": 0.5, "rir": 0.5, "dataset": "d", "model": "m", "pratio": 0.1}
    rest |= {"record_digest": "d", "settings_digest": "s", "baseline": "attack", "origin": "ours", "ratio": 0.1}
    rest |= {"acc_lost": 0.1, "code": "c", "seconds": 60.0, "reused": None, "target": "0"}
    whole = {name: pd.array([None] * len(rows), dtype="Int64") for name in ("record_seed", "test_images", "seed")}
    frame = pd.DataFrame(rows, columns=columns).assign(**rest, **whole)
    return frame.assign(defense=frame["method"])
