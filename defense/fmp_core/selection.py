"""Which feature maps to prune: ``--selection`` frg (the paper), shift (ours), random or none. Clean images only."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pprint import pformat
from typing import Any

import torch
from torch import Tensor, nn

from . import ranks
from .compute import choose_dtype
from .evaluate import predict, to_unit
from .evidence import FAMILIES, Evidence, choose_within_budget, weigh
from .feature_maps import ConvLayer
from .progress import Progress
from .pruning import accuracy_without
from .racing import race
from .ranking import Choice, Scores, choose, choose_by_chance, score_feature_maps
from .ranking_state import RankingCheckpoints
from .score_cache import cache_file, content_key, load_scores, save_scores
from .settings import Settings

HELD_OUT = 1000  # clean images, the last of the subset, that tell how many maps the budget allows


@dataclass(frozen=True)
class Selector:
    """Looks at a model and chooses.

    Args:
        model: takes pixels in [0,1]; ``layers`` are its convolutions in execution order.
        images: uint8 ``[M, C, H, W]``, the clean subset, on the model's device; ``labels`` int64 ``[M]``.
        shared: the folder below which scores are cached (:func:`~fmp_core.score_cache.cache_file`).
        timed: a context manager that counts the seconds of a named stage.
    """

    model: nn.Module
    layers: list[ConvLayer]
    images: Tensor
    labels: Tensor
    settings: Settings
    shared: Path
    timed: Callable[[str], AbstractContextManager[None]]

    @property
    def logger(self) -> logging.Logger:
        return logging.getLogger("fmp_core")

    def look(self) -> tuple[Scores | None, Evidence | None]:
        """The scores that decide, and the first evidence of a backdoor, else the last; without any, the paper's scores.

        Raises:
            UserError: a ranking checkpoint is damaged; a process of torchrun ended early.
        """
        evidence = None
        if self.settings.selection not in ("frg", "shift"):
            return None, None
        if self.settings.selection == "shift":
            for family in FAMILIES:
                scores = self._rank(family)
                images, labels = self.images[: scores.samples], self.labels[: scores.samples]
                right = predict(self.model, images, labels, self.settings.batch_size)[0] == labels
                evidence = weigh(family, scores, float(right.double().mean()))
                self.logger.info("%s perturbations: %s", family, pformat(evidence.as_dict(), compact=True))
                if evidence.backdoored:
                    return scores, evidence
            self.logger.info("the model is not shown to be backdoored; the feature maps are chosen by the paper's count")
        return self._rank("paper"), evidence

    def choose(self, scores: Scores | None, evidence: Evidence | None) -> Choice:
        """The maps to prune, by what :meth:`look` found."""
        settings = self.settings
        if evidence is not None and evidence.backdoored:
            with self.timed("budget"):
                return choose_within_budget(evidence.push, settings.budget, self._accuracy_without)
        if settings.selection == "none":
            return Choice(torch.zeros(sum(layer.channels for layer in self.layers), dtype=torch.bool))
        if scores is None:
            return choose_by_chance(self.layers, settings.p, settings.scope, settings.random_seed)
        return choose(scores, settings.p, settings.scope)

    def _accuracy_without(self, mask: Tensor) -> float:
        chosen = Choice(mask).by_layer(self.layers)
        return accuracy_without(self.model, self.layers, chosen, self.images[-HELD_OUT:], self.labels[-HELD_OUT:])

    def _rank(self, family: str) -> Scores:
        """The scores of all feature maps, from the cache if the same question was answered before."""
        settings, layers = self.settings, self.layers
        count = len(self.images) if settings.frg_samples == "all" else min(int(settings.frg_samples), len(self.images))
        images = to_unit(self.images[:count]).contiguous(memory_format=torch.channels_last)
        labels = self.labels[:count]
        maps = sum(layer.channels for layer in layers)
        dtype = choose_dtype(settings.dtype, images.device)
        question: dict[str, Any] = {"eps": settings.eps, "steps": settings.frg_steps, "alpha": settings.alpha}
        if family != "paper":
            question = {"eps": FAMILIES[family], "steps": 1, "alpha": None}
        question |= {"seed": settings.random_seed, "family": family}
        racing = settings.ranking == "racing" and dtype == torch.float32 and family == "paper"
        if settings.ranking == "racing" and not racing:
            self.logger.warning("--ranking racing is for the paper's scores in fp32; all maps are scored in full here")
        rules = {"dtype": str(dtype)} | ({"racing": [settings.p, settings.scope]} if racing else {})
        key = content_key(self.model.state_dict(), images, labels, {**question, **rules})
        scores = None if settings.fresh else load_scores(self.shared, key, layers)
        if not ranks.leader_says(scores is not None):
            scores = None
        elif scores is None:  # saved since this process looked
            scores = load_scores(self.shared, key, layers)
        if scores is not None:
            found = cache_file(self.shared, key)
            self.logger.info("scores of %d feature maps read from %s (--fresh ranks again)", maps, found)
            return scores
        self.logger.info("ranking %d feature maps of %d layers on %d clean images in %s", maps, len(layers), count, dtype)
        checkpoints = RankingCheckpoints(self.shared / "cache", key, settings.fresh)
        mine = int(ranks.share(torch.ones(maps, dtype=torch.bool)).sum())
        with self.timed("ranking"), Progress("Ranking", mine * count, "map-images", self.logger) as bar:
            score = partial(
                score_feature_maps,
                self.model,
                layers,
                images,
                labels,
                **question,
                rows=None if settings.chunk == "auto" else int(settings.chunk),
                memory_mib=settings.memory,
                progress=bar.add,
            )
            if racing:
                scores = race(
                    lambda kind, wanted: score(dtype=kind, wanted=wanted, checkpoint=checkpoints.of(kind, wanted)),
                    maps, settings.p, settings.scope,
                )  # fmt: skip
            else:
                scores = score(dtype=dtype, checkpoint=checkpoints.of(dtype, None))
        if ranks.leads():
            save_scores(self.shared, key, scores)
        checkpoints.remove()
        return scores
