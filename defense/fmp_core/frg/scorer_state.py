"""How far a ranking has come: what is counted so far, and its checkpoint."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmp_core.errors import UserError
from fmp_core.frg.scores import Counts
from fmp_core.storage.checkpoint import Checkpoint
from fmp_core.system import distributed

EVERY = 20.0  # seconds between checkpoints; more where saving takes longer than a twentieth of that


@dataclass
class RankingState:
    """A ranking between two groups of maps.

    ``whole`` counts the first ``images`` images for all maps; ``part`` counts the next batch, at most ``rows`` images, for its
    first ``groups`` groups of ``copies`` maps (0: not known yet). ``wanted`` is what ``rows`` was before memory ran out.
    """

    whole: Counts
    part: Counts
    images: int
    rows: int
    wanted: int
    groups: int = 0
    copies: int = 0

    @staticmethod
    def empty(total: int, rows: int, device: torch.device) -> RankingState:
        whole, part = (Counts.empty(total, device) for _ in range(2))
        return RankingState(whole, part, 0, rows, wanted=rows)

    def begin_batch(self, rows: int) -> None:
        """Forget the batch under way, and take the next with ``rows`` images."""
        vars(self).update(self._batch_of(rows))

    def group_by(self, copies: int) -> None:
        """The batch under way is scored ``copies`` maps at a time; groups of another size are forgotten."""
        if self.copies != copies:
            self.begin_batch(self.rows)
            self.copies = copies

    def end_batch(self, images: int) -> None:
        """Count the batch in, with its ``images``, all at once: Ctrl-C comes before or after, and the state is saved then."""
        vars(self).update(whole=self.whole.plus(self.part), images=self.images + images, **self._batch_of(self.rows))

    def _batch_of(self, rows: int) -> dict[str, Any]:
        return {"part": Counts.empty(len(self.part.correct), self.part.correct.device), "rows": rows, "groups": 0, "copies": 0}

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "whole": self.whole._asdict(), "part": self.part._asdict()}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on where ``saved`` ends.

        Raises:
            ValueError, KeyError, TypeError: it is not of a ranking of as many maps.
        """
        restored = []
        for name in ("whole", "part"):
            counts = Counts(**saved[name])
            for own, theirs in zip(self.whole, counts, strict=True):
                if own.shape != theirs.shape or own.dtype != theirs.dtype:
                    raise ValueError("counts of another shape")
            restored.append(Counts(*(tensor.to(self.whole.margin.device) for tensor in counts)))
        images, rows, wanted, groups, copies = (int(saved[name]) for name in ("images", "rows", "wanted", "groups", "copies"))
        if images < 0 or rows < 1 or groups < 0 or copies < 0:
            raise ValueError("negative counts")
        self.whole, self.images = restored[0], images
        if wanted == self.wanted:  # else another batch size is wanted now, and the batch under way starts again
            self.part, self.rows, self.groups, self.copies = restored[1], rows, groups, copies


@dataclass
class RankingCheckpoints:
    """The files of one ranking below ``folder``: one for each call of the scorer (racing makes several).

    ``key`` is the :func:`~fmp_core.storage.checkpoint.content_key` of the question. ``fresh`` forgets what was saved before.
    ``continued``: something was saved before.
    """

    folder: Path
    key: str
    fresh: bool
    made: list[Checkpoint] = field(default_factory=list)
    continued: bool = False

    def of(self, precision: torch.dtype, maps: Tensor | None = None, image_ids: Tensor | None = None) -> Checkpoint:
        """For a call that scores ``maps`` (bool ``[N]``) on the images at ``image_ids`` (None: all)."""
        bits = b"".join(b"all" if chosen is None else chosen.numpy().tobytes() for chosen in (maps, image_ids))
        call = hashlib.sha256(str(precision).encode() + bits).hexdigest()[:8]
        path = self.folder / f"ranking_{self.key[:16]}_{call}_{distributed.share_name()}.pt"
        checkpoint = Checkpoint(path, {"key": self.key, "call": call, "share": distributed.share_name()})
        if self.fresh:
            checkpoint.remove()
        self.continued |= path.is_file()
        self.made.append(checkpoint)
        return checkpoint

    def remove(self) -> None:
        """What was saved on the way to scores that are known now, also by an earlier run of other processes."""
        for checkpoint in self.made:
            checkpoint.remove()
        if distributed.is_leader():
            for path in self.folder.glob(f"ranking_{self.key[:16]}_*.pt"):
                path.unlink(missing_ok=True)


class StateFile:
    """Keeps a :class:`RankingState` in ``checkpoint``, if there is one."""

    def __init__(self, checkpoint: Checkpoint | None):
        self.checkpoint = checkpoint
        self.due = time.monotonic() + EVERY

    @contextmanager
    def saving(self, fresh: RankingState) -> Iterator[RankingState]:
        """The state to go on from: the saved one, else ``fresh``. It is saved at the end and on Ctrl-C too."""
        saved = self.checkpoint.load() if self.checkpoint else None
        if saved is not None:
            assert self.checkpoint is not None
            try:
                fresh.restore(saved)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f"{self.checkpoint.path} is not the state of this ranking ({error}); remove it.") from None
            logging.getLogger("fmp_core").info("ranking goes on from %s (--fresh starts again)", self.checkpoint.path)
        try:
            yield fresh
        except KeyboardInterrupt:
            self.save(fresh)
            raise
        self.save(fresh)

    def save_if_due(self, state: RankingState) -> None:
        if time.monotonic() >= self.due:
            self.save(state)

    def save(self, state: RankingState) -> None:
        if self.checkpoint is None:
            return
        started = time.monotonic()
        self.checkpoint.save(state.as_dict())
        now = time.monotonic()
        self.due = now + max(EVERY, 20 * (now - started))
