"""Selecting feature maps from the suspicious model and clean images alone: ``--selection`` frg, trigger, random or none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fmp_core.frg.racing import race
from fmp_core.frg.reverse import FrgSettings
from fmp_core.frg.scorer import Batching, FeatureMapScorer
from fmp_core.frg.scorer_state import RankingCheckpoints
from fmp_core.frg.scores import Scores
from fmp_core.inputs import DefenderInputs
from fmp_core.inversion.search import TriggerSearch, inversions
from fmp_core.inversion.trigger import FAMILIES, WARPS
from fmp_core.inversion.verdict import Verdict
from fmp_core.models.evaluate import to_unit
from fmp_core.models.pruning import accuracy_without
from fmp_core.selection.cache import (
    cache_file,
    load_scores,
    load_verdicts,
    save_scores,
    save_verdicts,
    score_key,
    verdict_key,
)
from fmp_core.selection.choice import (
    Selection,
    in_equal_shares,
    most_within_budget,
    select_at_random,
    select_lowest,
    select_none,
)
from fmp_core.settings import Settings
from fmp_core.system import distributed
from fmp_core.system.cli import Stages
from fmp_core.system.devices import choose_dtype
from fmp_core.system.progress import Progress

LOGGER = logging.getLogger("fmp_core")
Found = TypeVar("Found")
Select = Callable[[DefenderInputs, Settings, Path, Stages], Selection]  # the arguments of select_feature_maps


def select_feature_maps(defender: DefenderInputs, settings: Settings, cache: Path, stages: Stages) -> Selection:
    """The feature maps to prune, selected as ``settings.selection`` says.

    Under ``torchrun`` all processes compute shares of scores and verdict; only the first process's selection counts.

    Args:
        cache: the folder below which scores and verdicts are kept.
        stages: counts seconds.

    Raises:
        UserError: a ranking checkpoint is damaged; a process of torchrun ended early.
    """
    if settings.selection == "none":
        return select_none(defender.layers)
    if settings.selection == "random":
        return select_at_random(defender.layers, settings.p, settings.scope, settings.random_seed)
    verdict = None
    if settings.selection == "trigger":
        verdict = test_for_backdoor(defender, settings, cache, stages)
        if verdict.backdoored:
            return select_by_trigger(defender, settings, verdict, stages)
        few = f" ({verdict.held_out} held-out clean images are too few to tell)" if verdict.too_few else ""
        LOGGER.info("the model is not shown to be backdoored%s; feature maps are selected by FRG, as in the paper", few)
    return select_lowest(score_or_load(defender, settings, cache, stages), settings.p, settings.scope, verdict)


def trigger_search(defender: DefenderInputs, settings: Settings) -> TriggerSearch:
    """Trigger inversion on the defender's model and images, with this run's seed and precision."""
    dtype = choose_dtype(settings.dtype, defender.images.device)
    return TriggerSearch(defender.model, defender.layers, defender.images, defender.labels, dtype, settings.random_seed)


def test_for_backdoor(defender: DefenderInputs, settings: Settings, cache: Path, stages: Stages) -> Verdict:
    """The verdict of the first family of triggers that shows a backdoor; if none does, the one with the largest margin.

    Where there are too few held-out images to tell, nothing is inverted, and all flip rates are 0.
    """
    search, classes = trigger_search(defender, settings), defender.num_classes
    if (untested := search.without_test(next(iter(FAMILIES)), classes)).too_few:
        return untested
    key = verdict_key(search, classes)
    cached = {} if settings.fresh else load_verdicts(cache, key, classes)
    verdicts: list[Verdict] = []
    with stages("trigger inversion"):
        for family in FAMILIES:
            verdict = _if_all_have(cached.get(family))
            if verdict is None:
                with Progress(f"Inverting {family} triggers", inversions(classes), "triggers", LOGGER) as bar:
                    verdict = search.test(family, classes, bar.add)
                if distributed.is_leader():
                    save_verdicts(cache, key, [*verdicts, verdict])
            else:
                stages.reuse("trigger inversion")
                LOGGER.info("the verdict on %s triggers is read from the cache (--fresh tests again)", family)
            LOGGER.info("%s", verdict)
            verdicts.append(verdict)
            if verdict.backdoored:
                break
    return max(verdicts, key=lambda verdict: verdict.margin)


def select_by_trigger(defender: DefenderInputs, settings: Settings, verdict: Verdict, stages: Stages) -> Selection:
    """The maps whose activation an inverted trigger changes most: as many as ``settings.budget`` allows.

    The budget is measured on held-out images, which no trigger was inverted on. Triggers of the other families come with it; a
    warp only if it is what shows the backdoor.
    """
    if not distributed.is_leader():  # one process goes on from here
        return select_none(defender.layers)
    search, layers = trigger_search(defender, settings), defender.layers
    families = [verdict.family, *(family for family in FAMILIES if family not in (verdict.family, *WARPS))]
    with stages("trigger inversion"):
        triggers = tuple(search.triggers(families, verdict.target))
    with stages("budget"):
        change = search.activation_change(triggers[0])

        def accuracy(mask: Tensor) -> float:
            return accuracy_without(defender.model, layers, Selection(mask).by_layer(layers), *search.held_out)

        mask = most_within_budget(in_equal_shares(change, layers), settings.budget, accuracy)
    return Selection(mask, verdict=verdict, triggers=triggers, activation_change=change)


def score_or_load(defender: DefenderInputs, settings: Settings, cache: Path, stages: Stages) -> Scores:
    """FRG's scores of all feature maps, from the cache if the same model was ranked with the same settings before."""
    count = len(defender.images) if settings.frg_samples == "all" else min(int(settings.frg_samples), len(defender.images))
    images, labels = to_unit(defender.images[:count]).contiguous(memory_format=torch.channels_last), defender.labels[:count]
    frg = FrgSettings(settings.eps, settings.frg_steps, settings.alpha, settings.random_seed)
    precision = choose_dtype(settings.dtype, images.device)
    racing = settings.ranking == "racing" and precision == torch.float32
    if settings.ranking == "racing" and not racing:
        LOGGER.warning("--ranking racing needs --dtype fp32; every feature map is scored in full here")
    about = {**frg._asdict(), "dtype": str(precision), "racing": [settings.p, settings.scope] if racing else None}
    key = score_key(defender.model, images, labels, about)
    checkpoints = RankingCheckpoints(cache / "cache", key, settings.fresh)
    scores = _if_all_have(None if settings.fresh else load_scores(cache, key, defender.layers))
    if scores is not None:
        stages.reuse("ranking")
        checkpoints.remove()  # of a run that was killed between saving scores and this
        LOGGER.info("scores of %d feature maps read from %s (--fresh ranks again)", scores.total, cache_file(cache, key))
        return scores
    maps = sum(layer.channels for layer in defender.layers)
    LOGGER.info("ranking %d feature maps on %d clean images in %s", maps, count, str(precision).removeprefix("torch."))
    own_maps = int(distributed.my_share(torch.ones(maps, dtype=torch.bool)).sum())
    batching = Batching(None if settings.chunk == "auto" else int(settings.chunk), settings.memory)
    with stages("ranking"), Progress("Ranking", own_maps * count, "map-images", LOGGER) as bar:
        scorer = FeatureMapScorer(defender.model, defender.layers, images, labels, frg, precision, batching, bar.add)
        if racing:
            scores = race(scorer, settings.p, settings.scope, checkpoints)
        else:
            scores = scorer.score(checkpoint=checkpoints.of(precision))
    if distributed.is_leader():
        save_scores(cache, key, scores)
    if checkpoints.continued:
        stages.reuse("ranking")
    checkpoints.remove()
    return scores


def _if_all_have(found: Found | None) -> Found | None:
    """What this process ``found`` in the cache; None for all processes if one of them did not find it there (yet)."""
    return found if distributed.all_agree(found is not None) else None
