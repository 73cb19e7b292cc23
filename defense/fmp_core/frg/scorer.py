"""Scoring feature maps by FRG (paper, Algorithm 1, lines 1-11)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fmp_core.frg.reverse import FrgSettings, SharedForward, noisy_start
from fmp_core.frg.scorer_state import RankingState, StateFile
from fmp_core.frg.scores import Counts, Scores, layer_slices, margins_of
from fmp_core.models.fast_ops import FastOps, to_precision
from fmp_core.models.feature_maps import ConvLayer, frozen
from fmp_core.storage.checkpoint import Checkpoint
from fmp_core.system import distributed
from fmp_core.system.devices import exact_convolutions, is_out_of_memory, min_exact_rows, min_rows, row_multiple, rows_per_batch

T = TypeVar("T")
# Batches of untrusted images are padded to a multiple, so that few sizes occur: kernels are made anew for each size.
UNTRUSTED_MULTIPLE = 16


class Batching(NamedTuple):
    """How much is computed at once: ``rows`` images per batch (default: what suits the device), fewer if the graph kept for
    them would take more than ``memory_mib`` (an estimate from one image). On a CPU no score depends on it, but with attention,
    whose products are not :mod:`~fmp_core.models.fast_ops`'."""

    rows: int | None = None
    memory_mib: int | None = None


class Predictor(Protocol):
    """Predicts margins ``[n, B]`` of the FRG images ``[n, B, C, H, W]`` made from the images at ``image_ids`` ``[B]`` for n
    maps of one layer. The second tensor, bool ``[n, B]``, marks those whose sign can be trusted."""

    def __call__(self, reverse: Tensor, image_ids: Tensor) -> tuple[Tensor, Tensor]: ...


class Group(NamedTuple):
    """FRG images of some maps of a layer, as many as fill a batch.

    ``map_ids`` int64 ``[n]``; ``padded`` ``[copies*rows, C, H, W]``: the FRG images are the first ``images`` rows of each of
    the first n copies, the rest is padding.
    """

    map_ids: Tensor
    padded: Tensor
    copies: int
    images: int

    def without_padding(self, rows: Tensor) -> Tensor:
        """``[n, images, ...]`` of a tensor with as many rows as ``padded``."""
        return rows.unflatten(0, (self.copies, -1))[: len(self.map_ids), : self.images]


class Scored(NamedTuple):
    """Some maps of a layer on a batch: ``map_ids`` ``[n]``, FRG images ``[n, B, C, H, W]``, the model's margins ``[n, B]``."""

    map_ids: Tensor
    reverse: Tensor
    margins: Tensor


class FeatureMapScorer:
    """Scores the feature maps of a model on clean images; under ``torchrun`` each process scores its share.

    The model must not change afterwards: in low precision the backward passes and the inference run on a copy made here.

    Args:
        model: takes pixels in [0,1]; left as it was found (mode, gradient flags, hooks).
        layers: from :func:`~fmp_core.models.feature_maps.trace_conv_layers`.
        images: float ``[M, C, H, W]`` in [0,1], not augmented, on the model's device; ``labels`` int64 ``[M]``.
        settings: how FRG images are made.
        precision: of the first step's backward passes and of the inference on FRG images (the first convolution and the logits
            stay float32).
        batching: on out of memory, batches are halved, down to :func:`~fmp_core.system.devices.min_rows`.
        progress: called with the number of (map, image) pairs just scored.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ConvLayer],
        images: Tensor,
        labels: Tensor,
        settings: FrgSettings,
        precision: torch.dtype = torch.float32,
        batching: Batching = Batching(),  # noqa: B008  # immutable
        progress: Callable[[int], None] = lambda pairs: None,
    ):
        self.model, self.layers, self.images, self.labels, self.settings = model, tuple(layers), images, labels, settings
        self.batching, self.progress, self.device = batching, progress, images.device
        self.total = sum(layer.channels for layer in layers)
        self.start = noisy_start(images, settings.eps, settings.seed)
        self._set_precision(precision)

    def in_precision(self, precision: torch.dtype) -> FeatureMapScorer:
        """The same scorer with another precision."""
        if precision == self.precision:
            return self
        other = copy.copy(self)
        other._set_precision(precision)
        return other

    def score(
        self, maps: Tensor | None = None, image_ids: Tensor | None = None, checkpoint: Checkpoint | None = None
    ) -> Scores:
        """Scores of all maps, the same for all processes.

        Args:
            maps: bool ``[N]``, the maps to score (default all); the others get 0.
            image_ids: int64, positions of the images to score on (default all).
            checkpoint: what is scored is saved there now and then and on Ctrl-C, and is not scored again: a killed and
                repeated call ends with the bits of an uninterrupted one.

        Raises:
            UserError: the checkpoint is damaged or of other settings; a process of torchrun ended early.
        """
        samples = len(self.images) if image_ids is None else len(image_ids)
        return self.count(maps, image_ids, checkpoint).scores(self.layers, samples)

    def count(
        self,
        maps: Tensor | None = None,
        image_ids: Tensor | None = None,
        checkpoint: Checkpoint | None = None,
        predictor: Predictor | None = None,
    ) -> Counts:
        """As :meth:`score`, but sums over the images. Where ``predictor``'s margins can be trusted, the model is not run."""
        maps = distributed.my_share(torch.ones(self.total, dtype=torch.bool) if maps is None else maps)
        ids = torch.arange(len(self.images), device=self.device)
        images, start, labels = self.images, self.start, self.labels
        if image_ids is not None:
            ids = image_ids.to(self.device)
            images, start, labels = images[ids], start[ids], labels[ids]
        file = StateFile(checkpoint)

        def score_batch(part: slice, state: RankingState) -> None:
            for group in self._groups(images[part], start[part], maps, state, len(images)):
                state.part.put(group.map_ids, Counts.over_images(*self._margins(group, labels[part], ids[part], predictor)))
                state.groups += 1
                file.save_if_due(state)
                self.progress(len(group.map_ids) * group.images)

        with self._ready(), file.saving(RankingState.empty(self.total, self.rows, self.device)) as state:
            if state.images:
                self.progress(state.images * int(maps.sum()))
            self._in_batches(len(ids), state, score_batch)
        distributed.combine(state.whole.correct, state.whole.margin, least=state.whole.smallest_margin)
        return state.whole

    def by_batch(self, maps: Tensor, summarise: Callable[[Tensor, Iterator[Scored]], T]) -> list[T]:
        """What ``summarise`` makes of each batch of all images, in order, for this process's share of ``maps``.

        It gets the ``image_ids`` ``[B]`` of the batch and what was scored, group by group. A batch that memory runs out in is
        not in the list, but its halves are.
        """
        maps, summaries = distributed.my_share(maps), list[T]()

        def scored(part: slice, ids: Tensor, state: RankingState) -> Iterator[Scored]:
            for group in self._groups(self.images[part], self.start[part], maps, state, len(self.images)):
                reverse = group.without_padding(group.padded)
                yield Scored(group.map_ids, reverse, self._margins(group, self.labels[part], ids)[0])
                self.progress(len(group.map_ids) * group.images)

        def summarise_batch(part: slice, state: RankingState) -> None:
            ids = torch.arange(part.start, part.stop, device=self.device)
            summaries.append(summarise(ids, scored(part, ids, state)))

        with self._ready():
            self._in_batches(len(self.images), RankingState.empty(self.total, self.rows, self.device), summarise_batch)
        return summaries

    def _set_precision(self, precision: torch.dtype) -> None:
        self.precision, device = precision, self.device
        with self._ready():
            self._low_precision = to_precision(self.model, self.layers[0].module, precision)
            rows = self.batching.rows or rows_per_batch(device)
            if self.batching.memory_mib is not None:
                rows = min(rows, self.batching.memory_mib * 2**20 // self._bytes_per_image())
            self.rows = max(min_exact_rows(device), rows)

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """The model frozen. TF32 would blur the difference of two nearly equal maps; it is off."""
        with frozen(self.model), exact_convolutions():
            yield

    def _in_batches(self, count: int, state: RankingState, work: Callable[[slice, RankingState], None]) -> None:
        """``work`` on ``count`` images from where ``state`` is, ``state.rows`` at a time, fewer if memory runs out."""
        fewest = min_rows(self.device)
        while state.images < count:
            left = count - state.images
            size = math.ceil(left / math.ceil(left / state.rows))
            try:
                work(slice(state.images, state.images + size), state)
            except (RuntimeError, MemoryError) as error:
                if state.rows == fewest or not is_out_of_memory(error):
                    raise
                state.begin_batch(max(fewest, state.rows // 2))
                continue
            state.end_batch(size)

    def _groups(self, images: Tensor, start: Tensor, maps: Tensor, state: RankingState, total: int) -> Iterator[Group]:
        """The FRG images of ``maps`` (bool ``[N]``), as many maps at a time as fill ``state.rows``.

        Groups that ``state`` has already are passed over. ``images`` are a batch of ``total``.
        """
        count = len(images)
        images, start, copies = self._padded(images, start, state.rows, total)
        state.group_by(copies)
        channels_of = {layer: maps[part].nonzero().flatten().tolist() for layer, part in layer_slices(self.layers)}
        layers = [layer for layer, channels in channels_of.items() if channels]
        if not layers:
            return
        map_ids = maps.nonzero().flatten().to(self.device).split([len(channels_of[layer]) for layer in layers])
        shared = SharedForward(self.model, layers, images, start, copies, self._low_precision, self.precision)
        done = state.groups
        for layer, ids in zip(layers, map_ids, strict=True):
            channels = channels_of[layer]
            for first in range(0, len(channels), copies):
                some = channels[first : first + copies]
                if done > 0:
                    done -= 1
                    self.progress(len(some) * count)
                    continue
                # A short group is padded: kernels are chosen by shape, and round differently.
                padded = some + [some[-1]] * (copies - len(some))
                yield Group(ids[first : first + copies], shared.reversed_images(layer, padded, self.settings), copies, count)

    def _padded(self, images: Tensor, start: Tensor, rows: int, total: int) -> tuple[Tensor, Tensor, int]:
        """``images`` and ``start`` filled up to a number that the device computes alike, and how many maps fill ``rows``."""
        exact = min(min_exact_rows(self.device), rows)
        # Each map's images, not the batch: where an image lies in it can round otherwise. And the passes that all maps share
        # have this number of rows: that of other batches of the same images, if these are enough.
        size = max(len(images), min(exact, total))
        size += -size % min(row_multiple(self.device), rows)
        padding = [0] * (size - len(images))
        images, start = torch.cat([images, images[padding]]), torch.cat([start, start[padding]])
        return images, start, max(math.ceil(exact / len(images)), rows // len(images))

    def forward_passes(self) -> None:
        """The passes that all maps share, of the first batch of images: for benchmarks."""
        with self._ready():
            some = slice(min(self.rows, len(self.images)))
            images, start, copies = self._padded(self.images[some], self.start[some], self.rows, some.stop)
            SharedForward(self.model, self.layers, images, start, copies, self._low_precision, self.precision)

    @torch.inference_mode()
    def _margins(
        self, group: Group, labels: Tensor, image_ids: Tensor, predictor: Predictor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Margins ``[n, B]`` of the group's images, and which are classified correctly, bool ``[n, B]``."""
        # A GPU would wait at every group for the choice of the untrusted images: there the model is run on all.
        if predictor is None or self.device.type == "cuda":
            return margins_of(group.without_padding(self._logits(group.padded)), labels)
        reverse = group.without_padding(group.padded)
        margins, trusted = predictor(reverse, image_ids)
        correct = margins > 0
        untrusted = (~trusted).flatten().nonzero().flatten()
        if len(untrusted):
            rows = torch.cat([untrusted, untrusted[-1:].expand(-len(untrusted) % UNTRUSTED_MULTIPLE)])
            logits = self._logits(reverse.flatten(0, 1)[rows].contiguous(memory_format=torch.channels_last))[: len(untrusted)]
            labels_of_rows = labels.expand(margins.shape).flatten()[untrusted]
            margins.view(-1)[untrusted], correct.view(-1)[untrusted] = margins_of(logits, labels_of_rows)
        return margins, correct

    def _logits(self, pixels: Tensor) -> Tensor:
        with FastOps(self.precision):
            return self._low_precision(pixels).float()

    def _bytes_per_image(self) -> int:
        """Bytes that the shared forward passes of one image keep alive."""
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        image, start = self.images[:1], self.start[:1]
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            shared = SharedForward(self.model, self.layers, image, start, 1, self._low_precision, self.precision)
        weights = {p.data_ptr() for net in (self.model, self._low_precision) for p in net.parameters()}
        kept = sum(size for pointer, size in sizes.items() if pointer not in weights)
        return kept + sum(t.nbytes for t in (*shared.clean.values(), *shared.difference.values()))
