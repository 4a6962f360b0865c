"""MeanCache: on a skipped step the interval's mean velocity stands in, on a schedule fixed before the run.

Source: arXiv 2601.19961 (ICLR 2026) and the authors' code for Z-Image and Qwen-Image. With u the mean
output over the last m steps, which begin with the output v' and cover the length L, a step of length d gets
v - d (v' - u) / L, v the last output; m = 1 is plain reuse. The paper finds computed steps and m by a
shortest path over measured errors; released are its results for 50 steps (`constants/meancache.json`).
Deviations: each guidance branch by itself, which is the same as long as the guidance is, since all is
linear; u is summed up from outputs, not read off the latents, so samplers other than Euler are served too.
For other models, numbers of steps and budgets [ours]: the released schedule whose share of computed steps
is nearest, stretched.
"""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from torch import Tensor

from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig, Shape, check
from h2cache.predictors import combine
from h2cache.program import Forward, Program, Stage, Stand
from h2cache.registry import BASELINES

MOST = 6  # steps that a mean is taken over
USUAL = "Z-Image"


@dataclass(frozen=True)
class MeanCacheConfig(MethodConfig):
    """Settings of MeanCache."""

    name = "meancache"
    requires = frozenset({"whole"})
    outputs_held = MOST

    budget: int = 13
    """Computed steps (B), >= 1. Lower: faster. As many as there are steps: nothing is skipped."""
    steps: tuple[int, ...] = ()
    """The computed steps themselves, rising from 0, in place of a budget."""
    orders: tuple[int, ...] = ()
    """For each of `steps`, m of the skipped steps behind it, 1 to 6."""
    checkpoint: str = ""
    """Whose released schedules to take; empty: those of the model's name, else of Z-Image."""

    def __post_init__(self) -> None:
        check("budget", self.budget, 1, float("inf"), "the first step is always computed")
        if self.steps and (self.steps[0] != 0 or any(b <= a for a, b in pairwise(self.steps))):
            raise ValueError(f"steps={self.steps}: they must rise, and begin with step 0")
        if len(self.orders) != len(self.steps):
            raise ValueError(f"orders={self.orders}: one for each of the {len(self.steps)} steps is needed")
        for order in self.orders:
            check("orders", order, 1, MOST, "so many outputs are averaged")
        if self.checkpoint and self.checkpoint not in released():
            raise ValueError(
                f"checkpoint={self.checkpoint!r}: there are schedules of {', '.join(released())}"
            )

    @property
    def needs_total_steps(self) -> bool:
        return True

    def for_checkpoint(self, checkpoint: str | None) -> MeanCacheConfig:
        known = checkpoint if checkpoint in released() else USUAL
        return replace(self, checkpoint=self.checkpoint or known or USUAL)

    def schedule(self, total: int) -> list[int]:
        """m of each of `total` steps; 0: it is computed."""
        computed, orders = list(self.steps), list(self.orders)
        if not computed:
            table = released()[self.checkpoint or USUAL]
            computed, orders = stretched(table, total, int(min(self.budget, total)))
        row = []
        for step in range(total):
            before = max(n for n, at in enumerate(computed) if at <= step)
            row.append(0 if computed[before] == step else max(1, orders[before]))
        return row

    def bytes_needed(self, shape: Shape) -> int:
        return self.outputs_held * shape.tensor(shape.img, shape.out)

    def build(self) -> MeanCache:
        return MeanCache(self)


def released() -> dict:
    """The authors' schedules, by checkpoint."""
    path = importlib.resources.files(BASELINES) / "constants" / "meancache.json"
    return json.loads(path.read_text(encoding="utf-8"))


def stretched(table: dict, total: int, budget: int) -> tuple[list[int], list[int]]:
    """Computed steps and the order behind each: the released ones where they fit, else the nearest's."""
    share = {int(b): abs(math.log(int(b) / table["steps"] * total / budget)) for b in table["schedules"]}
    nearest = table["schedules"][str(min(share, key=lambda b: (share[b], b)))]
    steps, orders = nearest["computed"], [*nearest["orders"], 1]
    if (total, budget) == (table["steps"], len(steps)):
        return steps, orders
    places = np.linspace(0, len(steps) - 1, budget)
    own = np.interp(places, range(len(steps)), steps) * (total - 1) / (table["steps"] - 1)
    found: list[int] = []
    for n, place in enumerate(own):  # a step is computed once, and enough are left for the others
        found.append(min(max(round(float(place)), found[-1] + 1 if found else 0), total - budget + n))
    return found, [orders[int(place)] for place in places]


def mean_velocity(lengths: Sequence[float], ahead: float) -> list[float]:
    """The weights of the last outputs, oldest first, for a step of length `ahead`.

    lengths: of the steps that the outputs belong to.
    """
    total, last = math.fsum(lengths), len(lengths) - 1
    if not total:
        return [0.0] * last + [1.0]
    slope = ahead / total
    return [float(n == last) - slope * (float(n == 0) - at / total) for n, at in enumerate(lengths)]


@dataclass
class Past:
    """The last outputs of a branch, computed or not, and the lengths of their steps."""

    orders: list[int]
    outputs: list[list[Tensor]] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)


class MeanCache(Method):
    """Answers for the whole model."""

    config: MeanCacheConfig

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One denoising step of one branch."""
        step, course = memory.course_step, memory.course
        past = memory.state("past", lambda: Past(self.config.schedule(course.steps)))
        order = past.orders[step]
        hit = order > 0 and bool(past.outputs)
        if hit:
            output = combine(
                past.outputs[-order:], mean_velocity(past.lengths[-order:], course.lengths[step])
            )
            yield Stand(output)
        else:
            output = [part.detach().clone() for part in (yield Forward())]
        past.outputs = [*past.outputs, output][-MOST:]
        past.lengths = [*past.lengths, course.lengths[step]][-MOST:]
        memory.record_whole("hit" if hit else "miss")
