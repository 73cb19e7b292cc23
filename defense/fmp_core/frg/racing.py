"""Racing: the lowest N/p feature maps of an exact ranking, without exact scores of the others (docs/performance.md).

At eps = 1/255 a feature map flips the prediction of few images: those whose margin is small already.

1. The margin of an FRG image is predicted to first order (:mod:`.margin_taylor`) around the mean FRG image of a few probe maps.
2. Calibration maps, some of each layer, are scored on all images. They show, per layer, which images are undecided (maps differ
   in whether they flip the prediction), and the tolerance within which predicted margins cannot be trusted.
3. Every other map is scored on its layer's undecided images; the model is run where the predicted margin cannot be trusted. The
   other images count as for the calibration maps. That gives every map's count.
4. Maps whose count lies at or below the cut are scored on the other images too: there the mean margin decides.
5. Of these, the maps that may end below the cut given the error of predicted margins are scored in full: in bfloat16 where the
   hardware has it, and of those again the ones that may end below the cut in the precision asked for.

The selection is the exact one with high probability, not with certainty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fmp_core.frg.margin_taylor import MarginTaylor
from fmp_core.frg.scorer import FeatureMapScorer, Scored
from fmp_core.frg.scorer_state import RankingCheckpoints
from fmp_core.frg.scores import Counts, Scores, cuts, layer_slices
from fmp_core.models.feature_maps import ConvLayer
from fmp_core.system import distributed
from fmp_core.system.devices import has_fast_bfloat16

PROBE_MAPS, CALIBRATION_MAPS = 2, 12  # per layer
UNDECIDED = 4.0  # standard deviations over maps within which a margin of 0 makes an image undecided: all but 6e-5, if normal
TRUSTED = 4.5  # standard deviations of its error that a predicted margin keeps from 0 to be trusted: all but 7e-6, if normal
CONTENDERS = 2  # times the maps below the cut are scored in full at first
CONFIDENCE = 4.0  # standard deviations of its margin's error that a dropped map keeps from the cut: all but 3e-5, if normal
STUDENT = 6.25  # the same of Student's t with 11 degrees of freedom: the error is known from the CALIBRATION_MAPS of a layer


def race(
    scorer: FeatureMapScorer,
    p: int,
    scope: str,
    checkpoints: RankingCheckpoints | None = None,
    cheap_precision: torch.dtype | None = None,
) -> Scores:
    """Scores whose lowest N/p maps are those of ``scorer.score()``, with the same bits; ``settled`` marks maps scored in full.

    Args:
        p, scope: see :func:`~fmp_core.frg.scores.cuts`.
        cheap_precision: of all but the last stage; bfloat16 where the hardware has it, else the scorer's own.
    """
    if cheap_precision is None:
        cheap_precision = torch.bfloat16 if has_fast_bfloat16(scorer.device) else scorer.precision
    cheap = scorer.in_precision(cheap_precision)
    scores, error = predict_scores(cheap, p, scope, checkpoints)
    scores = score_contenders(scores, cheap, p, scope, checkpoints, error)
    return scores if cheap is scorer else score_contenders(scores, scorer, p, scope, checkpoints)


def predict_scores(
    scorer: FeatureMapScorer, p: int, scope: str, checkpoints: RankingCheckpoints | None = None
) -> tuple[Scores, Tensor]:
    """Predicted scores of all maps, and by how much their margins may err (standard deviations, float64 ``[N]``).

    ``settled`` marks the maps whose margin is known: those at or below a cut, and the calibration maps.
    """
    layers, images = scorer.layers, len(scorer.images)
    taylor = MarginTaylor(scorer.model, mean_reverse(scorer), scorer.labels, scorer.rows)
    calibration = _evenly(layers, CALIBRATION_MAPS)
    counts, predictors = calibrate(scorer, taylor, calibration)

    def count(maps: Tensor, undecided: bool) -> Counts:
        """Of ``maps``, on the images that are undecided in their layer, or on the others."""
        total = Counts.empty(len(maps), maps.device)
        for (_, positions), predictor in zip(layer_slices(layers), predictors, strict=True):
            some = torch.zeros_like(maps)
            some[positions] = maps[positions]
            image_ids = (predictor.undecided == undecided).nonzero().flatten().cpu()  # the host waits, once per layer
            if some.any() and len(image_ids):
                checkpoint = checkpoints.of(scorer.precision, some, image_ids) if checkpoints else None
                total = total.plus(scorer.count(some, image_ids, checkpoint, predictor).cpu())
        return total

    counts = counts.plus(count(~calibration, undecided=True))
    decided = torch.tensor([predictor.decided_correct for predictor in predictors])
    widths = torch.tensor([layer.channels for layer in layers])
    expected = counts._replace(correct=counts.correct + decided.repeat_interleave(widths) * ~calibration)
    low = calibration.clone()
    for cut in cuts(expected.scores(layers, images), p, scope):
        if cut.count:
            low[cut.order] |= expected.correct[cut.order] <= expected.correct[cut.last]
    counts = counts.plus(count(low & ~calibration, undecided=False))
    scores = counts._replace(correct=torch.where(low, counts.correct, expected.correct)).scores(layers, images)
    error = torch.tensor([predictor.error for predictor in predictors], dtype=torch.float64).repeat_interleave(widths)
    return replace(scores, margin=scores.margin.where(low, -torch.inf), settled=low), error


def score_contenders(
    cheap: Scores,
    scorer: FeatureMapScorer,
    p: int,
    scope: str,
    checkpoints: RankingCheckpoints | None = None,
    error: Tensor | None = None,
) -> Scores:
    """Scores whose lowest N/p maps are ``scorer``'s; ``settled`` marks all maps that it scored.

    A map is dropped if its cheap score stays above the full score at the cut by more than cheap scores err, :data:`CONFIDENCE`
    or :data:`STUDENT` standard deviations: in the mean margin and, if the smallest margin of a correct image is no larger than
    an error, in its count (at least one image).

    Args:
        cheap: scores of all maps; where they are not ``settled``, ``margin`` is the least it may be.
        error: standard deviations of the cheap margins' errors, float64 ``[N]``, from maps chosen by chance; the counts are
            those of ``scorer`` then. Without it the maps scored in full show how far all err.
    """
    settled = torch.zeros(cheap.total, dtype=torch.bool)
    known = ~settled if cheap.settled is None else cheap.settled
    correct, margin, smallest_margin = cheap.correct.clone(), cheap.margin.clone(), cheap.smallest_margin.clone()
    floor, contenders = cheap.margin, settled.clone()
    for cut in cuts(cheap, p, scope):
        contenders[cut.order[: CONTENDERS * cut.count]] = True
    first = contenders & known  # not chosen for a count that may be wrong
    while contenders.any():
        checkpoint = checkpoints.of(scorer.precision, contenders) if checkpoints else None
        full = scorer.score(contenders, checkpoint=checkpoint)
        for own, found in ((correct, full.correct), (margin, full.margin), (smallest_margin, full.smallest_margin)):
            own[contenders] = found[contenders]
        settled |= contenders
        if error is None:
            slack = torch.full_like(margin, CONFIDENCE * _rms((margin - cheap.margin)[settled & known]))
            fragile = cheap.smallest_margin < slack * cheap.samples**0.5  # one image errs more than the mean of all
            wrong = fragile * max(1, math.ceil(CONFIDENCE * _rms((correct - cheap.correct)[first])))
        else:
            slack, wrong = STUDENT * error, torch.zeros_like(correct)
        floor = cheap.margin - slack
        scores = replace(cheap, correct=correct, margin=margin, settled=settled)
        contenders = _may_be_below_cut(scores, cheap.correct - wrong, floor, p, scope)
    margin = torch.where(settled, margin, floor)
    return replace(cheap, correct=correct, margin=margin, smallest_margin=smallest_margin, settled=settled)


def _rms(errors: Tensor) -> float:
    return float(errors.double().square().mean().sqrt()) if len(errors) else 0.0


def _may_be_below_cut(scores: Scores, least: Tensor, floor: Tensor, p: int, scope: str) -> Tensor:
    """Maps not settled that would end below the cut of their group with the ``least`` count and margin they may have."""
    found = torch.zeros(scores.total, dtype=torch.bool)
    assert scores.settled is not None
    for cut in cuts(scores, p, scope):
        if cut.count:
            others = cut.order[~scores.settled[cut.order]]
            close = (least[others] == scores.correct[cut.last]) & (floor[others] <= scores.margin[cut.last])
            found[others] = (least[others] < scores.correct[cut.last]) | close
    return found


def mean_reverse(scorer: FeatureMapScorer) -> Tensor:
    """The FRG images ``[M, C, H, W]``, mean over the probe maps of all layers."""
    probes = _evenly(scorer.layers, PROBE_MAPS)

    def add_up(image_ids: Tensor, scored: Iterator[Scored]) -> Tensor:
        total = torch.zeros_like(scorer.images[image_ids], dtype=torch.float64)  # the order of the sum does not show
        for group in scored:
            total += group.reverse.sum(0, dtype=torch.float64)
        return total

    total = torch.cat(scorer.by_batch(probes, add_up))
    distributed.combine(total)
    return (total / probes.sum()).float()


@dataclass(frozen=True)
class LayerPredictor:
    """Predicted margins of a layer's maps, calibrated for each of M images; a :class:`~fmp_core.frg.scorer.Predictor`.

    ``undecided`` bool ``[M]``: maps differ in whether they flip the image's prediction. ``bias`` float ``[M]``: by how much
    first order is too low. ``tolerance`` float ``[M]``: predicted margins nearer to 0 are not trusted. ``decided_correct``: how
    many images are decided, and classified correctly. ``error``: standard deviation of a map's mean predicted margin.
    """

    taylor: MarginTaylor
    undecided: Tensor
    bias: Tensor
    tolerance: Tensor
    decided_correct: int
    error: float

    def __call__(self, reverse: Tensor, image_ids: Tensor) -> tuple[Tensor, Tensor]:
        margins = self.taylor.margins(reverse, image_ids) + self.bias[image_ids]
        return margins, margins.abs() > self.tolerance[image_ids]


def calibrate(scorer: FeatureMapScorer, taylor: MarginTaylor, maps: Tensor) -> tuple[Counts, list[LayerPredictor]]:
    """Counts of the calibration ``maps`` (bool ``[N]``) on all images, and what they say of each layer."""
    row = (maps.cumsum(0) - 1).to(scorer.device)

    def compare(image_ids: Tensor, scored: Iterator[Scored]) -> Tensor:
        margins = torch.zeros(2, int(maps.sum()), len(image_ids), device=scorer.device)
        for group in scored:
            margins[0, row[group.map_ids]] = group.margins
            margins[1, row[group.map_ids]] = taylor.margins(group.reverse, image_ids)
        return margins

    both = torch.cat(scorer.by_batch(maps, compare), 2)
    distributed.combine(both)
    counts = Counts.empty(scorer.total, maps.device)
    counts.put(maps, Counts.over_images(both[0], both[0] > 0).cpu())
    sizes = [int(maps[positions].sum()) for _, positions in layer_slices(scorer.layers)]
    margins, first_order = both[0].split(sizes), both[1].split(sizes)

    mean = torch.stack([exact.mean(0) for exact in margins])
    bias = torch.stack([(exact - first).mean(0) for exact, first in zip(margins, first_order, strict=True)])
    predicted = [first + own for first, own in zip(first_order, bias, strict=True)]
    errors = [exact - guess for exact, guess in zip(margins, predicted, strict=True)]
    spread, _ = _pooled(torch.stack([exact.std(0, correction=0) for exact in margins]))
    deviation, relative = _pooled(torch.stack([error.square().mean(0).sqrt() for error in errors]))
    undecided, tolerance = mean.abs() < UNDECIDED * spread, TRUSTED * deviation * relative.clamp_min(1)
    trusted = [guess.abs() > limit for guess, limit in zip(predicted, tolerance, strict=True)]
    decided = ((mean > 0) & ~undecided).sum(1).tolist()  # here and in the next line the host waits, once per layer
    further = [_error_of_others((error * use).mean(1)) for error, use in zip(errors, trusted, strict=True)]
    rows = zip(undecided, bias, tolerance, decided, further, strict=True)
    return counts, [LayerPredictor(taylor, *values) for values in rows]


def _error_of_others(residuals: Tensor) -> float:
    """Standard deviation with which a further map errs, from the ``residuals`` of ``[n]`` maps about their own mean."""
    count = len(residuals)
    return float(residuals.square().sum() / max(1, count - 1) * (1 + 1 / count)) ** 0.5


def _evenly(layers: Sequence[ConvLayer], count: int) -> Tensor:
    """``count`` maps of each layer, evenly spread; bool ``[N]``."""
    chosen = torch.zeros(sum(layer.channels for layer in layers), dtype=torch.bool)
    for layer, positions in layer_slices(layers):
        chosen[torch.linspace(positions.start, positions.stop - 1, min(count, layer.channels)).round().long()] = True
    return chosen


def _pooled(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviations ``[L, M]`` raised to what all L layers say of an image, and by how much it stands out, ``[M]``.

    A few maps of one layer easily miss what flips the prediction of an image; those of all layers do not.
    """
    usual = scale.median(1, keepdim=True).values.clamp_min(torch.finfo(scale.dtype).tiny)
    oddity = (scale / usual).square().mean(0).sqrt()
    return torch.maximum(scale, oddity * usual), oddity
