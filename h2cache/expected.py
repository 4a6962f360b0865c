"""How near a picture will be to the uncached one, from what its own run has seen.

Each evaluation shows two things of the gap before it: how far the output moved, and how wrong a line over
the gap was. Compared with what is usual for the plan, at five places of a run, they tell hard pictures from
easy ones. What each means in dB is learnt by `tune`: by ridge regression over the pictures of all its plans,
and then of each. Huber's loss is used, since a few pictures turn into others by what no gap shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PLACES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of a run, where pictures are compared with the usual
RIDGE = 30.0  # pictures' worth of doubt that anything sets them apart
OWN_RIDGE = 100.0  # that it does so by one plan in another way than by all
HUBER = 1.5  # dB from which on a picture pulls no more than others do
ROUNDS = 8  # of weighted regressions, by which Huber's loss is minimised
FOLDS = 16  # of pictures, of which each is left out once to see the error
CUBIC = 3  # how the error of a line grows with the length of its gap: a parabola, summed up
LEAST = 8  # measured pictures of a plan, from which something can be learnt
SAME = 100.0  # dB, of pictures that are equal

Array = NDArray[np.float64]
Weights = tuple[float, ...]  # PSNR of a usual picture, and what each dB of `compared` adds; empty: not learnt


@dataclass(frozen=True, slots=True)
class Seen:
    """What an evaluation shows of the gap before it, of each image: root mean squares, (B,)."""

    since: int  # step of the evaluation before
    change: Tensor  # of the output, over the gap
    error: Tensor | None  # of what a line would have added wrongly to the sample; None: no step was skipped

    def halved(self) -> Seen:
        """Of pictures, each of which is twice in the batch: with guidance, and without."""
        error = None if self.error is None else _of_both(self.error)
        return Seen(self.since, _of_both(self.change), error)


def _of_both(values: Tensor) -> Tensor:
    """The root mean square of the first half and the second."""
    return values.reshape(2, -1).square().mean(0).sqrt()


@dataclass(frozen=True, slots=True)
class Gap:
    """The same for one image, on the host."""

    start: int  # steps that are evaluated
    end: int
    change: float
    error: float  # 0: no step was skipped


def gaps_of(seen: Sequence[tuple[int, Seen]]) -> list[tuple[Gap, ...]]:
    """The gaps of each image, from what evaluations at these steps have shown; a wait for the device."""
    if not seen:
        return []
    values = [
        torch.stack([one.change, one.change * 0 if one.error is None else one.error]) for _, one in seen
    ]
    images = torch.stack(values).permute(2, 0, 1).tolist()  # the one wait
    return [
        tuple(Gap(one.since, step, *own) for (step, one), own in zip(seen, image, strict=True))
        for image in images
    ]


def usual_gaps(pictures: Sequence[Sequence[Gap]]) -> tuple[Gap, ...]:
    """The geometric means over pictures that have the same gaps."""

    def mean(values: Sequence[float]) -> float:
        return float(f"{geometric_mean(values):.5g}") if min(values) > 0 else 0.0

    return tuple(
        Gap(own[0].start, own[0].end, mean([g.change for g in own]), mean([g.error for g in own]))
        for own in zip(*pictures, strict=True)
    )


def compared(gaps: Sequence[Gap], usual: Sequence[Gap], steps: int) -> Array:
    """How much more than usual the output moved, then how much more lines missed, at `PLACES`: dB.

    usual: the same gaps. Where a run has not come to a place yet, its newest gap counts.
    """
    known = {(gap.start, gap.end): gap for gap in usual}
    pairs = [(gap, known[gap.start, gap.end]) for gap in gaps if (gap.start, gap.end) in known]
    middles = [(gap.start + gap.end) / 2 for gap, _ in pairs]
    changes = _at_places(middles, [(gap.change, other.change) for gap, other in pairs], steps)
    errors = _at_places(middles, [(gap.error, other.error) for gap, other in pairs], steps)
    return np.concatenate([changes, errors])


def _at_places(middles: Sequence[float], pairs: Sequence[tuple[float, float]], steps: int) -> Array:
    """The ratios of `pairs`, dB, from the middles of their gaps to `PLACES`; 0 where nothing is known."""
    found = [
        (at, 20 * math.log10(own / usual))
        for at, (own, usual) in zip(middles, pairs, strict=True)
        if 0 < own < math.inf and 0 < usual < math.inf
    ]
    places = np.array(PLACES) * steps
    return np.interp(places, *np.array(found).T) if found else np.zeros(len(places))


def between(usual: Sequence[Gap], start: int, end: int) -> Gap:
    """The error that a gap which is not among the `usual` ones would show, by those around it; no change."""
    known = [gap for gap in usual if gap.error > 0]
    if not known:
        return Gap(start, end, 0.0, 0.0)
    at = [(gap.start + gap.end) / 2 for gap in known]
    rates = [math.log(gap.error / (gap.end - gap.start) ** CUBIC) for gap in known]
    rate = math.exp(np.interp((start + end) / 2, at, rates))
    return Gap(start, end, 0.0, rate * (end - start) ** CUBIC)


@dataclass(frozen=True)
class Estimate:
    """What the gaps of a picture say about its PSNR, dB."""

    slope: float  # by steps that were not tuned: PSNR = offset - slope * 20 log10(sum of errors)
    offset: float
    error: float  # root mean square over the pictures of all plans
    within: float = 1.0  # the slope among pictures of one plan
    weighted_error: float = 0.0  # of the plans' own weights, over pictures that these were not learnt from

    def psnr(self, gaps: Sequence[Gap]) -> float:
        """What to expect by steps that were not tuned."""
        total = math.fsum(gap.error for gap in gaps)
        return min(SAME, self.offset - self.slope * 20 * math.log10(total)) if total else SAME

    def ahead(self, gaps: Sequence[Gap], usual: Sequence[Gap]) -> float:
        """How much better than usual a picture is on its way, by the sum of its errors so far."""
        own, other = (math.fsum(gap.error for gap in part) for part in (gaps, usual))
        return -self.within * 20 * math.log10(own / other) if 0 < own < math.inf and other > 0 else 0.0


@dataclass(frozen=True)
class Sample:
    """The pictures of one plan, the same for all plans, and their PSNR."""

    evaluations: int
    steps: int
    pictures: Sequence[Sequence[Gap]]
    values: Sequence[float]


def fit(samples: Sequence[Sample]) -> tuple[Estimate | None, list[Weights]]:
    """Learn what gaps mean, and the weights of each plan; None where pictures are too few or too alike."""
    count = min((len(sample.values) for sample in samples), default=0)
    line = _line(samples) if count >= LEAST else None
    if line is None:
        return None, [()] * len(samples)
    known = [_Known.of(sample) for sample in samples]
    folds, missed = min(count, FOLDS), []
    for fold in range(folds):  # what do some mean that was not learnt from?
        rest = [k.part(k.numbers % folds != fold) for k in known]
        for own, others, weights in zip(known, rest, _weights(rest), strict=True):
            left = own.part(own.numbers % folds == fold)
            missed += [*(left.expected(weights) - left.y)] if len(others.y) else []
    error = float(np.sqrt(np.mean(np.square(missed)))) if missed else 0.0
    learnt = [tuple(round(float(w), 4) for w in weights) for weights in _weights(known)]
    return Estimate(*line, _within(samples), round(error, 4)), learnt


def _totals(sample: Sample) -> Array:
    """The sum of errors, dB, and the PSNR of each picture that is not as the uncached one: (pictures, 2)."""
    sums = [math.fsum(gap.error for gap in gaps) for gaps in sample.pictures]
    pairs = zip(sums, sample.values, strict=True)
    usable = [(20 * math.log10(total), value) for total, value in pairs if total > 0 and value < SAME]
    return np.array(usable).reshape(-1, 2)


def _line(samples: Sequence[Sample]) -> tuple[float, float, float] | None:
    """Slope, offset and error of the line from the sum of errors to PSNR, over all pictures."""
    x, y = np.concatenate([_totals(sample) for sample in samples] or [np.empty((0, 2))]).T
    if len(np.unique(x)) < 2:
        return None
    slope, offset = np.polyfit(-x, y, 1)
    error = np.sqrt(np.mean((offset - slope * x - y) ** 2))
    return round(float(slope), 4), round(float(offset), 4), round(float(error), 4)


def _within(samples: Sequence[Sample]) -> float:
    """The slope of such a line among the pictures of a plan; at least 0."""
    parts = [part - part.mean(0) for part in map(_totals, samples) if len(part)]
    x, y = np.concatenate(parts).T
    return round(max(0.0, float(-x @ y / max(x @ x, 1e-9))), 4)


@dataclass(frozen=True)
class _Known:
    """The pictures of a plan that are not as the uncached ones."""

    evaluations: int
    numbers: NDArray[np.int64]  # of the pictures
    x: Array  # what `compared` says of each
    y: Array  # PSNR

    @classmethod
    def of(cls, sample: Sample) -> _Known:
        usual = usual_gaps(sample.pictures)
        numbers = [n for n, value in enumerate(sample.values) if value < SAME]
        x = [compared(sample.pictures[n], usual, sample.steps) for n in numbers]
        shaped = np.array(x).reshape(len(x), 2 * len(PLACES))
        y = np.array([sample.values[n] for n in numbers], dtype=float)
        return cls(sample.evaluations, np.array(numbers, dtype=int), shaped, y)

    def part(self, kept: NDArray[np.bool_]) -> _Known:
        return _Known(self.evaluations, self.numbers[kept], self.x[kept], self.y[kept])

    def expected(self, weights: Array) -> Array:
        return weights[0] + self.x @ weights[1:]


def _weights(known: Sequence[_Known]) -> list[Array]:
    """Of each plan, by Huber's loss: regressions that count pictures less, the worse they were explained."""
    counts = [np.ones(len(k.y)) for k in known]
    for _ in range(ROUNDS):
        weights = _weighted(known, counts)
        off = [np.abs(k.expected(own) - k.y) for k, own in zip(known, weights, strict=True)]
        counts = [HUBER / np.maximum(one, HUBER) for one in off]
    return weights


def _weighted(known: Sequence[_Known], counts: Sequence[Array]) -> list[Array]:
    """a + b / evaluations, with a and b of all plans, and what a plan's own pictures add to that."""
    middles = [
        (np.average(k.x, 0, c), np.average(k.y, 0, c)) if len(c) else (np.zeros(k.x.shape[1]), 0.0)
        for k, c in zip(known, counts, strict=True)
    ]
    parts = [(k.x - x, k.y - y, k.evaluations) for k, (x, y) in zip(known, middles, strict=True)]
    x = np.concatenate([np.hstack([x, x / evaluations]) for x, _, evaluations in parts])
    y = np.concatenate([y for _, y, _ in parts])
    a, b = np.split(_ridge(x, y, np.concatenate(counts), RIDGE), 2)
    found = []
    for (x, y, evaluations), count, (at, usual) in zip(parts, counts, middles, strict=True):
        common = a + b / evaluations
        own = common + _ridge(x, y - x @ common, count, OWN_RIDGE)
        found.append(np.concatenate([[usual - at @ own], own]))
    return found


def _ridge(x: Array, y: Array, counts: Array, doubt: float) -> Array:
    """Ridge regression, of columns of equal size, in which each row counts so much."""
    scale = np.maximum(np.sqrt(np.mean(x**2, axis=0)), 1e-9) if len(x) else np.ones(x.shape[1])
    x = x / scale
    weighted = x.T * counts
    return np.linalg.solve(weighted @ x + doubt * np.eye(x.shape[1]), weighted @ y) / scale
