"""Which feature maps to prune: ``--selection`` frg (the paper), trigger (ours), random or none. Clean images only."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from pprint import pformat
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fmp_core.frg.image_racing import foretell_scores, mean_reverse
from fmp_core.frg.margin_taylor import MarginTaylor
from fmp_core.frg.racing import race
from fmp_core.frg.scorer import Choice, Scores, choose, choose_by_chance, score_feature_maps
from fmp_core.frg.scorer_state import RankingCheckpoints
from fmp_core.inversion.trigger import FAMILIES, InvertedTrigger
from fmp_core.inversion.verdict import Evidence, TriggerSearch, choose_within_budget, most_moved_first
from fmp_core.models.evaluate import to_unit
from fmp_core.models.feature_maps import ConvLayer
from fmp_core.models.pruning import accuracy_without
from fmp_core.selection.cache import cache_file, content_key, load_evidence, load_scores, save_evidence, save_scores
from fmp_core.settings import Settings
from fmp_core.system import distributed
from fmp_core.system.devices import choose_dtype
from fmp_core.system.progress import Progress

Found = TypeVar("Found")
HELD_OUT = 1000  # clean images, the last of the subset, that tell how many maps the budget allows


@dataclass(frozen=True)
class Selector:
    """Looks at a model and chooses.

    Args:
        model: takes pixels in [0,1]; ``layers`` are its convolutions in execution order.
        images: uint8 ``[M, C, H, W]``, the clean subset, on the model's device; ``labels`` int64 ``[M]``.
        shared: the folder below which scores are cached (:func:`~fmp_core.selection.cache.cache_file`).
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

    def look(self, classes: int) -> tuple[Scores | None, Evidence | None]:
        """The paper's scores, unless a model of ``classes`` classes is shown to be backdoored; and the evidence, if asked for.

        Raises:
            UserError: a ranking checkpoint is damaged; a process of torchrun ended early.
        """
        evidence = None
        if self.settings.selection == "trigger":
            evidence = self.evidence(classes)
            if evidence.backdoored:
                return None, evidence
            few = f" ({evidence.held_out} held-out clean images are too few to tell)" if evidence.too_few else ""
            self.logger.info("the model is not shown to be backdoored%s; the paper's count chooses the feature maps", few)
        return (self._rank() if self.settings.selection in ("frg", "trigger") else None), evidence

    def reverse(self, evidence: Evidence | None) -> list[InvertedTrigger]:
        """Triggers towards the class of the backdoor, the one that showed it first; none if there is no backdoor."""
        if evidence is None or not evidence.backdoored:
            return []
        families = [evidence.family, *(family for family in FAMILIES if family != evidence.family)]
        with self.timed("trigger inversion"):
            return self.trigger_search().triggers(families, evidence.target)

    def choose(self, scores: Scores | None, trigger: InvertedTrigger | None) -> Choice:
        """The maps to prune: those that ``trigger`` moves most, else those with the lowest ``scores``."""
        settings = self.settings
        if trigger is not None:
            with self.timed("budget"):
                moved = self.trigger_search().moved(trigger)
                order = most_moved_first(moved, self.layers)
                return replace(choose_within_budget(order, settings.budget, self._accuracy_without), moved=moved)
        if settings.selection == "none":
            return Choice(torch.zeros(sum(layer.channels for layer in self.layers), dtype=torch.bool))
        if scores is None:
            return choose_by_chance(self.layers, settings.p, settings.scope, settings.random_seed)
        return choose(scores, settings.p, settings.scope)

    def evidence(self, classes: int) -> Evidence:
        """The evidence of the first family that shows a backdoor; if none does, of the one in which a class leads most."""
        found: list[Evidence] = []
        search = self.trigger_search()
        about = {"seed": search.seed, "dtype": str(search.dtype), "classes": classes, "families": FAMILIES}
        key = content_key(self.model.state_dict(), self.images, self.labels, about)

        def saved(family: str) -> Evidence | None:
            return load_evidence(self.shared, key, classes).get(family)

        with self.timed("trigger inversion"):
            for family in FAMILIES:
                evidence = self._cached(partial(saved, family))
                if evidence is None:
                    evidence = search.weigh(family, classes)
                    if distributed.is_leader():
                        save_evidence(self.shared, key, [*found, evidence])
                self.logger.info("%s perturbations: %s", family, pformat(evidence.as_dict(), compact=True))
                found.append(evidence)
                if evidence.backdoored:
                    break
        return max(found, key=lambda evidence: evidence.lead)

    def trigger_search(self) -> TriggerSearch:
        """What reverses triggers, with this run's seed and dtype."""
        dtype = choose_dtype(self.settings.dtype, self.images.device)
        return TriggerSearch(self.model, self.layers, self.images, self.labels, dtype, self.settings.random_seed)

    def _accuracy_without(self, mask: Tensor) -> float:
        chosen = Choice(mask).by_layer(self.layers)
        return accuracy_without(self.model, self.layers, chosen, self.images[-HELD_OUT:], self.labels[-HELD_OUT:])

    def _cached(self, read: Callable[[], Found | None]) -> Found | None:
        """What ``read`` finds in the cache, for all processes alike: what the first one sees there, decides."""
        found = None if self.settings.fresh else read()
        if not distributed.broadcast(found is not None):
            return None
        return read() if found is None else found  # saved since this process looked

    def _rank(self) -> Scores:
        """The scores of all feature maps, from the cache if the same question was answered before."""
        settings, layers = self.settings, self.layers
        count = len(self.images) if settings.frg_samples == "all" else min(int(settings.frg_samples), len(self.images))
        images = to_unit(self.images[:count]).contiguous(memory_format=torch.channels_last)
        labels = self.labels[:count]
        maps = sum(layer.channels for layer in layers)
        dtype = choose_dtype(settings.dtype, images.device)
        question: dict[str, Any] = {"eps": settings.eps, "steps": settings.frg_steps, "alpha": settings.alpha}
        question["seed"] = settings.random_seed
        racing = settings.ranking == "racing" and dtype == torch.float32
        if settings.ranking == "racing" and not racing:
            self.logger.warning("--ranking racing is for scores in fp32; all maps are scored in full here")
        rules = {"dtype": str(dtype)} | ({"racing": [settings.p, settings.scope]} if racing else {})
        key = content_key(self.model.state_dict(), images, labels, {**question, **rules})
        scores = self._cached(lambda: load_scores(self.shared, key, layers))
        if scores is not None:
            found = cache_file(self.shared, key)
            self.logger.info("scores of %d feature maps read from %s (--fresh ranks again)", maps, found)
            return scores
        self.logger.info("ranking %d feature maps of %d layers on %d clean images in %s", maps, len(layers), count, dtype)
        checkpoints = RankingCheckpoints(self.shared / "cache", key, settings.fresh)
        mine = int(distributed.my_share(torch.ones(maps, dtype=torch.bool)).sum())
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
                scores = self._race(score, checkpoints, images, labels)
            else:
                scores = score(dtype=dtype, checkpoint=checkpoints.of(dtype))
        if distributed.is_leader():
            save_scores(self.shared, key, scores)
        checkpoints.remove()
        return scores

    def _race(self, score: Callable[..., Scores], checkpoints: RankingCheckpoints, images: Tensor, labels: Tensor) -> Scores:
        """Scores in float32 of the maps that may be chosen; the others are dropped on what costs less."""
        layers, p, scope = self.layers, self.settings.p, self.settings.scope

        def cheaply(wanted: Tensor, which: Tensor | None = None, watch: Any = None, foretell: Any = None) -> Scores:
            kept = None if watch else checkpoints.of(torch.bfloat16, wanted, which)
            return score(dtype=torch.bfloat16, wanted=wanted, which=which, watch=watch, foretell=foretell, checkpoint=kept)

        def exactly(wanted: Tensor) -> Scores:
            return score(dtype=torch.float32, wanted=wanted, checkpoint=checkpoints.of(torch.float32, wanted))

        first_order = MarginTaylor(self.model, mean_reverse(cheaply, layers, images), labels)
        foretold, error = foretell_scores(cheaply, first_order, layers, p, scope)
        return race(race(foretold, cheaply, p, scope, error), exactly, p, scope)
