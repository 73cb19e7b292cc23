"""Scoring every feature map by FRG and choosing the lowest (paper, Algorithm 1, lines 1-13)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fmp_core.frg.reverse import FrgSettings, SharedForward, noisy_start
from fmp_core.frg.scorer_state import Answers, Keeper, RankingState
from fmp_core.frg.scores import Scores, comparison_groups, cuts, layer_slices, lowest
from fmp_core.models.fast_ops import FastOps, to_precision
from fmp_core.models.feature_maps import ConvLayer, frozen
from fmp_core.storage.checkpoint import Checkpoint
from fmp_core.system import distributed
from fmp_core.system.devices import fewest_rows, is_out_of_memory, least_rows, rows_per_batch

STEP = 8  # few batches of unsure images differ in size then: kernels are made anew for each size


@dataclass(frozen=True)
class Choice:
    """The maps to prune: ``mask`` bool ``[N]``; ``ties`` counts maps whose ``correct`` equals that of a cut they straddle.

    ``moved`` float64 ``[N]``: how far a inverted trigger moves each map, if that chose them.
    """

    mask: Tensor
    ties: int = 0
    moved: Tensor | None = None

    def by_layer(self, layers: Sequence[ConvLayer]) -> dict[str, Tensor]:
        return {layer.name: self.mask[where] for layer, where in slices(layers)}


slices = layer_slices


class Watch(Protocol):
    """Sees what the model answers to the maps at ``where`` ``[n]``: their FRG images ``[n, B, C, H, W]``, made from the images
    from ``first`` on, and the logits ``[n, B, K]``. A batch that memory ran out in is begun, and seen, again."""

    def __call__(self, where: Tensor, reverse: Tensor, logits: Tensor, first: int) -> None: ...


class Foretell(Protocol):
    """Foretells the margins ``[n, B]`` of FRG images ``[n, B, C, H, W]``, made from the images from ``first`` on. The second
    tensor, bool ``[n, B]``, says of whose signs it is sure."""

    def __call__(self, reverse: Tensor, first: int) -> tuple[Tensor, Tensor]: ...


def choose(scores: Scores, p: int, scope: str) -> Choice:
    return Choice(*lowest(scores, p, scope))


def choose_by_chance(layers: Sequence[ConvLayer], p: int, scope: str, seed: int) -> Choice:
    """As many maps as :func:`choose` takes, drawn without looking at the model: the control of FMP's ranking."""
    generator = torch.Generator().manual_seed(seed)
    groups = comparison_groups(layers, scope)
    mask = torch.zeros(groups[-1].stop, dtype=torch.bool)
    for group in groups:
        size = group.stop - group.start
        mask[group.start + torch.randperm(size, generator=generator)[: size // p]] = True
    return Choice(mask)


def ordered_groups(scores: Scores, scope: str) -> list[Tensor]:
    return [cut.order for cut in cuts(scores, 1, scope)]


def score_feature_maps(
    model: nn.Module,
    layers: Sequence[ConvLayer],
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 1,
    alpha: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    rows: int | None = None,
    memory_mib: int | None = None,
    wanted: Tensor | None = None,
    which: Tensor | None = None,
    watch: Watch | None = None,
    foretell: Foretell | None = None,
    progress: Callable[[int], None] = lambda pairs: None,
    checkpoint: Checkpoint | None = None,
) -> Scores:
    """Score all feature maps on all ``images``; under ``torchrun`` each process scores its share and all get the whole.

    With a ``checkpoint``, what is scored is saved there now and then and on Ctrl-C, and is not scored again: a killed and
    repeated call ends with the bits of an uninterrupted one.

    Args:
        model: takes pixels in [0,1]; left as it was found (mode, gradient flags, hooks).
        layers: from :func:`~fmp_core.models.feature_maps.trace_conv_layers`.
        images: float ``[M, C, H, W]`` in [0,1], not augmented, on the model's device.
        labels: int64 ``[M]``.
        eps, steps, alpha: see :meth:`~fmp_core.frg.reverse.SharedForward.reversed_images`; alpha defaults to 2.5*eps/steps.
        seed: of the start noise, one draw per image, shared by all maps.
        dtype: of backward passes and of the inference on FRG images (the first convolution and the logits stay float32).
        rows: images per batch; the default suits the device. On a CPU scores do not depend on it. Halved when memory runs
            out, down to :func:`~fmp_core.system.devices.fewest_rows`.
        memory_mib: lowers ``rows`` so that the retained graph fits (an estimate from one image).
        wanted: bool ``[N]``, the maps to score (default all); the others get 0.
        which: int64, positions of the ``images`` to score on, which keep their noise (default all).
        watch: called for each group of maps and batch of images, but not for what a checkpoint has already.
        foretell: gives the margins instead of the model, where it is sure of their sign.
        progress: called with the number of (map, image) pairs just scored.

    Raises:
        UserError: the checkpoint is damaged or of another question; a process of torchrun ended early.
    """
    device = images.device
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    start = noisy_start(images, noise.to(device), eps)
    if which is not None:
        which = which.to(device)
        images, labels, start = images[which], labels[which], start[which]
    attack = FrgSettings(eps, steps, 2.5 * eps / steps if alpha is None else alpha)
    total = sum(layer.channels for layer in layers)
    # TF32 would blur the difference of two nearly equal maps; speed comes from dtype, not from it.
    with frozen(model), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        keeper = Keeper(checkpoint)
        twin = to_precision(model, layers[0].module, dtype)
        engine = Engine(model, twin, dtype, layers, attack, progress, keeper, watch, foretell)
        rows = max(least_rows(device), rows or rows_per_batch(device))
        if memory_mib is not None:
            fitting = memory_mib * 2**20 // engine.bytes_per_image(images[:1], start[:1])
            rows = max(fewest_rows(device), min(rows, fitting))
        mine = distributed.my_share(torch.ones(total, dtype=torch.bool) if wanted is None else wanted)
        with keeper.saving(RankingState.empty(total, rows, device)) as state:
            if state.images:
                progress(state.images * int(mine.sum()))
            while state.images < len(images):
                left = len(images) - state.images
                batch = math.ceil(left / math.ceil(left / state.rows))
                part = slice(state.images, state.images + batch)
                try:
                    engine.score(images[part], start[part], labels[part], mine, state)
                except RuntimeError as error:
                    if state.rows == fewest_rows(device) or not is_out_of_memory(error):
                        raise
                    state.begin_batch(max(fewest_rows(device), state.rows // 2))
                    continue
                state.end_batch(batch)
    tally = state.whole
    distributed.combine(tally.correct, tally.margin, least=tally.smallest_margin)
    correct, margin, smallest_margin = (tensor.cpu() for tensor in tally)
    return Scores(tuple(layers), correct, margin / len(images), smallest_margin, len(images))


class Engine(NamedTuple):
    """What scoring one batch of images needs: the float32 model, its twin of ``dtype``, and what to do with them."""

    model: nn.Module
    twin: nn.Module
    dtype: torch.dtype
    layers: Sequence[ConvLayer]
    attack: FrgSettings
    progress: Callable[[int], None]
    keeper: Keeper
    watch: Watch | None = None
    foretell: Foretell | None = None

    def score(self, images: Tensor, start: Tensor, labels: Tensor, wanted: Tensor, state: RankingState) -> None:
        """Put the tally of one batch into ``state.part``, for each map ``wanted`` (bool ``[N]``).

        As many maps at a time as fill ``state.rows``. Groups of maps that ``state`` has already are not scored again.
        """
        count, least = len(images), min(least_rows(images.device), state.rows)
        filling = [0] * (-count % least)  # each map's images, not the batch: where an image lies in it can round otherwise
        images, start = torch.cat([images, images[filling]]), torch.cat([start, start[filling]])
        copies = max(1, state.rows // len(images))
        state.group_by(copies)
        asked = [(layer, maps) for layer, maps in slices(self.layers) if wanted[maps].any()]
        if not asked:
            return
        shared = SharedForward(self.model, [layer for layer, _ in asked], images, start, copies, self.twin, self.dtype)
        group = 0
        for layer, maps in asked:
            todo = wanted[maps].nonzero().flatten().tolist()
            places = (torch.tensor(todo, dtype=torch.int64) + maps.start).to(images.device)
            for lead in range(0, len(todo), copies):
                channels, where = todo[lead : lead + copies], places[lead : lead + copies]
                group += 1
                if group <= state.groups:
                    self.progress(len(channels) * count)
                    continue
                # A short group is filled up: kernels are chosen by shape, and round differently.
                filled = channels + [channels[-1]] * (copies - len(channels))
                reverse = shared.reversed_images(layer, filled, self.attack)
                with torch.inference_mode(), FastOps(self.dtype):
                    state.part.put(where, self.answers(reverse, copies, where, labels, state.images))
                state.groups = group
                self.keeper.now_and_then(state)
                self.progress(len(channels) * count)

    def answers(self, reverse: Tensor, copies: int, where: Tensor, labels: Tensor, first: int) -> Answers:
        """To the FRG images ``reverse`` ``[copies*rows, ...]`` of the maps at ``where``; ``labels`` are of the images from
        ``first`` on."""

        def asked(rows: Tensor) -> Tensor:
            return rows.unflatten(0, (copies, -1))[: len(where), : len(labels)]  # the rest is filling

        if self.foretell is not None:
            return self.foretold(asked(reverse), labels, *self.foretell(asked(reverse), first))
        logits = asked(self.twin(reverse).float())
        if self.watch is not None:
            self.watch(where, asked(reverse), logits, first)
        return Answers.of(logits, labels)

    def foretold(self, reverse: Tensor, labels: Tensor, margins: Tensor, sure: Tensor) -> Answers:
        """The foretold ``margins`` ``[n, B]``, but the model's answers where these are not ``sure``."""
        hits = margins > 0
        answers = Answers(hits, margins, torch.where(hits, margins, torch.inf))
        unsure = (~sure).flatten().nonzero().flatten()
        if len(unsure):
            rows = torch.cat([unsure, unsure[-1:].expand(-len(unsure) % STEP)])
            images = reverse.flatten(0, 1)[rows].contiguous(memory_format=torch.channels_last)
            logits = self.twin(images).float()[: len(unsure)]
            found = Answers.of(logits, labels.expand(margins.shape).flatten()[unsure])
            for whole, part in zip(answers, found, strict=True):
                whole.view(-1)[unsure] = part
        return answers

    def bytes_per_image(self, image: Tensor, start: Tensor) -> int:
        """Bytes that the shared forward passes of one image keep alive."""
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            shared = SharedForward(self.model, self.layers, image, start, 1, self.twin, self.dtype)
        weights = {p.data_ptr() for net in (self.model, self.twin) for p in net.parameters()}
        kept = sum(size for pointer, size in sizes.items() if pointer not in weights)
        return kept + sum(t.nbytes for t in (*shared.clean.values(), *shared.difference.values()))
