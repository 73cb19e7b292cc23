"""The files of an unfinished ranking: one for each question, and none for who wants a fresh one."""

from __future__ import annotations

from pathlib import Path

import torch
from fmp_core.frg.scorer_state import RankingCheckpoints

MAPS, IMAGES = torch.tensor([True, False, True]), torch.tensor([0, 2])


def files(folder: Path, fresh: bool = False, key: str = "k" * 64) -> RankingCheckpoints:
    return RankingCheckpoints(folder, key, fresh)


def test_each_call_has_a_file_of_its_own(tmp_path: Path) -> None:
    asked = [
        (torch.float32, MAPS, IMAGES),
        (torch.bfloat16, MAPS, IMAGES),
        (torch.float32, ~MAPS, IMAGES),
        (torch.float32, MAPS, IMAGES + 1),
        (torch.float32, None, IMAGES),
        (torch.float32, MAPS, None),
    ]
    made = [files(tmp_path).of(*call) for call in asked]
    assert len({checkpoint.path for checkpoint in made}) == len({str(checkpoint.made_with) for checkpoint in made}) == 6
    assert files(tmp_path).of(*asked[0]).path == made[0].path != files(tmp_path, key="j" * 64).of(*asked[0]).path


def test_a_fresh_ranking_forgets_what_was_saved(tmp_path: Path) -> None:
    files(tmp_path).of(torch.float32).save({"images": 7})
    going_on = files(tmp_path)
    assert not going_on.continued
    assert going_on.of(torch.float32).load() == {"images": 7} and going_on.continued
    fresh = files(tmp_path, fresh=True)
    assert fresh.of(torch.float32).load() is None and not fresh.continued and not list(tmp_path.iterdir())
