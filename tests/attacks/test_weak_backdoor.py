"""The warning of a backdoor that training hardly implanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import make_record
import numpy as np
import pandas as pd
import pytest
from fmp_core.attacks import make_record as making
from made_records import make
from PIL import Image


@pytest.mark.parametrize(("pratio", "weak"), [("0", False), ("0.1", True), ("0.9", False)])
def test_a_weak_backdoor_is_warned_of_unless_there_is_none(pratio: str, weak: bool, tmp_path: Path) -> None:
    """Three images of five are of class 0, which a hardly trained model names, unless most of them are poisoned."""
    rng = np.random.default_rng(0)
    for split, index in [("train", i) for i in range(30)] + [("test", i) for i in range(9)]:
        file = tmp_path / "toys" / split / f"class{(0, 0, 1, 2, 0)[index % 5]}" / f"{index:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    where = [
        "--dataset",
        str(tmp_path / "toys"),
        "--record_root",
        str(tmp_path),
        "--save_folder_name",
        "mine",
        "--device",
        "cpu",
    ]
    training = ["--model", "squeezenet1_0", "--epochs", "2", "--batch_size", "8", "--amp", "False", "--lr", "0.02"]
    assert make_record.main([*where, *training, "--pratio", pratio, "--attack_target", "1"]) == 0
    (log,) = (tmp_path / "mine").glob("*.log")
    assert ("the backdoor is weak: ASR is" in log.read_text()) == weak
    asr = pd.read_csv(tmp_path / "mine" / "attack_df.csv")["test_asr"].iloc[-1]
    assert (asr < 0.5) == (pratio != "0.9")  # of the control, too, which is not warned of


@pytest.mark.parametrize(("rates", "weak"), [((0.1, 0.9), False), ((0.9, 0.125), True)])
def test_a_backdoor_is_weak_if_it_is_so_in_the_end(
    rates: tuple[float, float], weak: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = making.train_attacked_model

    def measured(*about: Any) -> Any:
        history = real(*about)
        for (_, metrics), rate in zip(history, rates, strict=True):
            metrics["test_asr"] = rate
        return history

    monkeypatch.setattr(making, "train_attacked_model", measured)
    (log,) = make(data, tmp_path).glob("*.log")
    assert ("the backdoor is weak: ASR is 12.5 %" in log.read_text()) == weak == ("is weak" in log.read_text())
