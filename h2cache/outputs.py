"""What stands in for skipped outputs of a model: a line through the last two, and payback of what it missed.

y: the newest output, d: how it differs from the one before. A skipped step takes y + t^2 lean d + owed /
room, with the line's lean over the noise level, and the length of the gap as its room. At the next
evaluation the parabola through three outputs says what the gap should have added to the sample; (1 + t) / 2
of what is missing is owed to the next gap.

The trust t, 0 to 1, is measured: the cosine of the last two differences, from 0.8 on in full, 0 where they
point apart. (The square of a cosine is the share of a change that a line explains.) With t = 1 this is a
two-step Adams method. On `tiny_wan`, whose first outputs turn, that is 22 dB worse; on the other small models
from 5 dB worse to 1.7 dB better: `tune` tries both.

The first difference has no other to be compared with. Of a flow its size says how far to follow it: one that
would, if it went on so, turn the output into another one long before the end is not the slope of a line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from h2cache.expected import Seen
from h2cache.predictors import combine
from h2cache.schedule import Course
from h2cache.weights import newton

HELD = 3  # tensors of an output's size that a branch keeps: the last two outputs, and what is owed
FIRST_TRUST = 0.5  # while there is nothing to measure it with, or the model predicts noise
STRAIGHT = 0.8  # cosine of two differences from which on a line is followed in full
TINY = 1e-30
LEAST = 1 / 20  # distance of two outputs, of the way to where they are asked for, that still makes a line

Weights = dict[int, float]  # step to weight of its output
Factor = float | Tensor  # of all samples, or (B,): of each
Parts = list[Tensor]  # an output of the model: often one tensor, with the samples in its first dimension


class Outputs:
    """The last outputs of one guidance branch.

    steps: those that are evaluated, of a denoiser whose own steps end before `end`. target: as `PlanConfig`
    has it. trust: how far lines are followed, 0 to 1; None: as far as the outputs did so far. samples: in the
    batch.
    """

    def __init__(
        self, course: Course, steps: Sequence[int], end: int, target: str, trust: float | None, samples: int
    ) -> None:
        self.course, self.steps, self.end, self.target = course, tuple(steps), end, target
        self.samples = samples
        self.measured = trust is None
        self._follow(FIRST_TRUST if trust is None else float(trust))
        self.kept: dict[int, Parts] = {}  # the newest two by step, oldest first
        self.owed: Parts | None = None  # what the next gap has to add to the sample

    @property
    def outputs_kept(self) -> list[Parts]:
        return [*self.kept.values(), *filter(None, [self.owed])]

    def skips(self, step: int) -> bool:
        return step < self.end and step not in self.steps

    def ready(self, step: int) -> bool:
        """Whether the planned output before `step` is there: guidance may have been off at its step."""
        return max(self.kept, default=None) == max((s for s in self.steps if s < step), default=None)

    def stand_in(self, step: int) -> Parts:
        """The output that is taken at a skipped step."""
        here = max(self.kept)
        newest, lean, room = self.kept[here], self._lean(step), self._room(here)
        sums = [part.to(torch.float32, copy=True) for part in newest]  # whoever gets it may write into it
        if lean:
            reach, before = 1 + self.followed * lean, self.kept[min(self.kept)]
            sums = [
                torch.lerp(before[n].float(), part, each(reach, newest, n, self.samples))
                for n, part in enumerate(sums)
            ]
        if self.owed and room:
            sums = [s.add_(part, alpha=1 / room) for s, part in zip(sums, self.owed, strict=True)]
        return [s.to(part.dtype) for s, part in zip(sums, newest, strict=True)]

    def learn(self, step: int, output: Parts) -> Seen | None:
        """Keep what was evaluated; returns what it shows of the gap before. None: it is the first."""
        seen = None
        if self.kept:
            here = max(self.kept)
            change = root_mean_square(difference(self.kept[here], output), self.samples)
            seen = Seen(here, change, self._settle(step, output, change))
        self.kept[step] = output
        while len(self.kept) >= HELD:
            del self.kept[min(self.kept)]
        ahead = range(step, self._next(step))
        if self.target == "ode" and len(ahead) > 1:  # what a sum over the sampler's own steps leaves out
            nodes = [*self.kept]
            missing = total((1.0, self._integral(nodes, ahead)), (-1.0, self._sum(nodes, ahead)))
            self._owe(self.kept, missing, self.followed)
        return seen

    def replan(self, step: int, steps: Sequence[int], trust: float | None) -> None:
        """Evaluate other steps after `step`."""
        self.steps = (*(s for s in self.steps if s <= step), *steps)
        if trust is not None:
            self._follow(float(trust))
        self.measured = trust is None

    def _follow(self, trust: Factor) -> None:
        """Trust lines so far, from here on: a number, or (B,)."""
        self.trust, self.followed = trust, trust**2

    def _settle(self, step: int, output: Parts, change: Tensor) -> Tensor | None:
        """See what the gap before `step` got wrong, by the parabola through its ends and the one before.

        change: of the output over the gap, (B,).
        """
        here, before, outputs = max(self.kept), min(self.kept), self.kept | {step: output}
        gap, add = range(here, step), self._integral if self.target == "ode" else self._sum
        wrong = total((1.0, add([*outputs], gap)), (-1.0, add([*self.kept], gap)))
        leant = total((1.0, add([*self.kept], gap)), (-1.0, add([here], gap)))
        followed = self.followed
        if self.measured and here == before and self.course.flow:
            way = self.course.levels[here] - self.course.levels[step]
            self._follow(first_trust(change, root_mean_square(output, self.samples), way))
        elif self.measured and self._lean(step):
            straight = cosine((outputs[before], outputs[here], output), self.samples)
            self._follow((straight / STRAIGHT).clamp(max=1.0))
        if self._room(here):
            self.owed = None  # it was paid in this gap
        paid = (1 + self.trust) / 2
        missed = self._owe(outputs, wrong, paid)
        self._owe(outputs, leant, paid * (1 - followed))
        return None if missed is None else root_mean_square(missed, self.samples)

    def _owe(self, outputs: dict[int, Parts], weights: Weights, factor: Factor) -> Parts | None:
        """Owe a share of a weighted sum of outputs; returns the sum. None: all weights are 0."""
        if not any(weights.values()) or (isinstance(factor, float) and not factor):
            return None
        parts = combine([outputs[step] for step in weights], list(weights.values()))
        shares = [part.float() * each(factor, parts, n, self.samples) for n, part in enumerate(parts)]
        if self.owed:
            shares = [share.add_(part) for share, part in zip(shares, self.owed, strict=True)]
        self.owed = [share.to(part.dtype) for share, part in zip(shares, parts, strict=True)]
        return parts

    def _next(self, step: int) -> int:
        return min([s for s in self.steps if s > step], default=self.end)

    def _room(self, step: int) -> float:
        """Length of the skipped steps after an evaluated one."""
        return math.fsum(self.course.lengths[step + 1 : self._next(step)])

    def _line(self, nodes: Sequence[int], step: int) -> Weights:
        levels = self.course.levels
        return through([(node, levels[node]) for node in nodes], levels[step])

    def _lean(self, step: int) -> float:
        """How many times the last change of the output the line adds to the newest one, at `step`."""
        return self._line([*self.kept], step)[max(self.kept)] - 1.0

    def _sum(self, nodes: Sequence[int], stretch: range) -> Weights:
        """What the polynomial through `nodes` adds to the sample, at the sampler's steps."""
        return total(*((self.course.lengths[q], self._line(nodes, q)) for q in stretch))

    def _integral(self, nodes: Sequence[int], stretch: range) -> Weights:
        """The same over infinitely many steps, by Simpson's rule: exact up to cubics."""
        levels = self.course.levels
        a, b = levels[stretch[0]], levels[stretch[-1] + 1]
        known, part = [(node, levels[node]) for node in nodes], (b - a) / 6
        middle = through(known, (a + b) / 2)
        return total((part, through(known, a)), (4 * part, middle), (part, through(known, b)))


def through(nodes: Sequence[tuple[int, float]], x: float) -> Weights:
    """The polynomial through the outputs of steps at known levels, (step, level) oldest first, at level `x`.

    Of outputs whose levels all but agree (the two of a Heun step) the newest counts: a small difference
    between them must not be drawn out to a long one.
    """
    used = list(nodes[-1:])
    for step, level in nodes[-2::-1]:
        near = min(abs(level - other) for _, other in used)
        if near and near >= LEAST * max(abs(x - other) for _, other in [*used, (step, level)]):
            used.insert(0, (step, level))
    row = newton([level for _, level in used], x, len(used) - 1)
    return {step: weight for (step, _), weight in zip(used, row, strict=True)}


def total(*parts: tuple[float, Weights]) -> Weights:
    """The weighted sum of weights."""
    out: Weights = {}
    for factor, weights in parts:
        for step, weight in weights.items():
            out[step] = out.get(step, 0.0) + factor * weight
    return out


def cosine(outputs: Sequence[Parts], samples: int) -> Tensor:
    """Of the last two changes of three outputs, 0 where they point apart: (B,)."""
    first, second = (difference(x, y) for x, y in pairwise(outputs))
    norms = dot(first, first, samples) * dot(second, second, samples)
    return (dot(first, second, samples) / norms.clamp(min=TINY).sqrt()).clamp(0.0, 1.0)


def first_trust(change: Tensor, size: Tensor, way: float) -> Tensor:
    """How far the line through the first two outputs of a flow is followed, 0 to 1: (B,).

    change, size: root mean squares of their difference and of the second, (B,). way: between their noise
    levels. It is 1 / (1 + r^2), with r the change over all levels at that pace, as a multiple of the output.
    """
    return 1 / (1 + (change / (size * abs(way)).clamp(min=TINY)) ** 2)


def difference(before: Parts, after: Parts) -> Parts:
    """What must be added to `before` to have `after`, in float32."""
    return [a.float() - b.float() for b, a in zip(before, after, strict=True)]


def root_mean_square(parts: Parts, samples: int) -> Tensor:
    """Of each sample's values: (B,)."""
    wide = [part.float() for part in parts]
    squares, sizes = dot(wide, wide, samples), [part.numel() for part in parts]
    if listed(parts, samples):
        return torch.stack([square / size for square, size in zip(squares, sizes, strict=True)]).sqrt()
    return (squares / (sum(sizes) / len(squares))).sqrt()


def dot(a: Parts, b: Parts, samples: int) -> Tensor:
    """Sum of the products of each sample's values: (B,); (1,) where it is not known whose they are."""
    products = [x * y for x, y in zip(a, b, strict=True)]
    if listed(a, samples):
        return torch.stack([p.sum() for p in products])
    rows = samples if stacked(a, samples) else 1
    return torch.stack([p.reshape(rows, -1).sum(1) for p in products]).sum(0)


def each(factor: Factor, parts: Parts, n: int, samples: int) -> Factor:
    """A factor of each sample, in a shape that multiplies part `n`."""
    if isinstance(factor, float):
        return factor
    return factor[n] if listed(parts, samples) else factor.reshape(-1, *[1] * (parts[n].ndim - 1))


def stacked(parts: Parts, samples: int) -> bool:
    """Whether the first dimension of each part is the samples."""
    return all(part.ndim > 0 and part.shape[0] == samples for part in parts)


def listed(parts: Parts, samples: int) -> bool:
    """Whether each part is a sample of its own (Z-Image), and not all samples' part of the output."""
    return len(parts) == samples and not stacked(parts, samples)
