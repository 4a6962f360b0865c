"""BudCache: exactly so many steps are computed, and a search on the finished picture has found which.

Source: arXiv 2606.13496 (ICML 2026) and the authors' code for FLUX.1-dev, Wan 2.1 and Z-Image. The residual
of all blocks is reused on the other steps. `search` is theirs: the first quarter of the budget is fixed;
simulated annealing moves computed steps from a random start, and steepest descent follows. What it found on
a model is in `constants/budcache.json`. Deviations: their released masks are no files of the repository, so
there are none of their models; where no search has been, the steps behind the fixed ones are spread evenly
[ours]; their second stage, which learns other timesteps, is left out. Text is not cached.
"""

from __future__ import annotations

import importlib.resources
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig, Shape, check
from h2cache.predictors import LastResidual
from h2cache.program import Program, Run, Skip, Stage, Stream
from h2cache.registry import BASELINES

Steps = tuple[int, ...]
NEAR, HOT, COLD = 3, 0.05, 1e-5  # how far a step moves; temperatures of the annealing, in units of the loss


@dataclass(frozen=True)
class BudCacheConfig(MethodConfig):
    """Settings of BudCache. The authors search for 10 of 28 steps in their example, and go down to 6."""

    name = "budcache"

    budget: int = 10
    """Computed steps (K), >= 1. Lower: faster. As many as there are steps: nothing is skipped."""
    steps: Steps = ()
    """The computed steps themselves, rising from 0, in place of a budget."""
    checkpoint: str = ""
    """Whose searched steps to take; empty: the model's name; "none": never, the even rule."""

    def __post_init__(self) -> None:
        check("budget", self.budget, 1, float("inf"), "the first step is always computed")
        if self.steps and (self.steps[0] != 0 or any(b <= a for a, b in pairwise(self.steps))):
            raise ValueError(f"steps={self.steps}: they must rise, and begin with step 0")

    @property
    def needs_total_steps(self) -> bool:
        return True

    def for_checkpoint(self, checkpoint: str | None) -> BudCacheConfig:
        return replace(self, checkpoint=self.checkpoint or checkpoint or "none")

    def schedule(self, total: int) -> Steps:
        """The computed ones of `total` steps."""
        if self.steps:
            return self.steps
        budget = int(min(self.budget, total))
        table = _searched().get(self.checkpoint, {})
        found = table.get("computed", {}).get(str(budget)) if table.get("steps") == total else None
        return tuple(found) if found else even(total, budget)

    def bytes_needed(self, shape: Shape) -> int:
        return shape.tensor(shape.img)

    def build(self) -> BudCache:
        return BudCache(self)


def _searched() -> dict:
    path = importlib.resources.files(BASELINES) / "constants" / "budcache.json"
    return json.loads(path.read_text(encoding="utf-8"))


def even(total: int, budget: int) -> Steps:
    """The fixed steps, and the others at equal distances behind them."""
    fixed = fixed_steps(budget)
    gap = (total - fixed + 1) / (budget - fixed + 1)
    return (*range(fixed), *(fixed - 1 + round(n * gap) for n in range(1, budget - fixed + 1)))


def fixed_steps(budget: int) -> int:
    """How many steps at the beginning are always computed."""
    return max(1, budget // 4)


@dataclass(frozen=True)
class Computed:
    """The computed steps of a request."""

    steps: frozenset[int]


class BudCache(Method):
    """Nothing is measured while it runs."""

    config: BudCacheConfig

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One denoising step of one branch."""
        step = memory.step  # first of all: asking may show that a new request began
        slot, blocks = memory.slot("stack", LastResidual), range(stages[-1].last)
        total = memory.total_steps
        computed = memory.state("computed", lambda: Computed(frozenset(self.config.schedule(total)))).steps
        full = slot.predictor.residual is None or step in computed or step >= total
        if full:
            ran = yield Run(blocks)
            slot.predictor.learn(Stream(ran.residual.img))
        else:
            yield Skip(blocks, slot.predictor.predict())
        memory.record_stack(stages, None, 0.0, not full)


# The search.


def search(
    loss: Callable[[Steps], float],
    total: int,
    budget: int,
    chance: random.Random,
    proposals: int = 200,
    rounds: int = 20,
) -> Iterator[tuple[Steps, float]]:
    """The computed steps with the least loss: yields each better one as it is found, with its loss.

    loss: of the finished latents against the uncached ones; the authors take their mean squared difference.
    It is asked once for each choice of steps. The caller may stop at any time.
    """
    known: dict[Steps, float] = {}

    def measure(steps: Steps) -> float:
        if steps not in known:
            known[steps] = loss(steps)
        return known[steps]

    fixed = fixed_steps(budget)
    here = (*range(fixed), *sorted(chance.sample(range(fixed, total), budget - fixed)))
    value = best = measure(here)
    yield here, best
    for n in range(proposals):
        heat = HOT * (COLD / HOT) ** (n / proposals)
        tried = proposal(here, total, chance)
        change = measure(tried) - value
        if change < 0 or chance.random() < math.exp(-change / heat):
            here, value = tried, measure(tried)
            if value < best:
                best = value
                yield here, best
    for _ in range(rounds):
        nearest = min(neighbours(here, total, chance), key=measure, default=here)
        if measure(nearest) >= value:
            return
        here, value = nearest, measure(nearest)
        if value < best:
            best = value
            yield here, best


def proposal(steps: Steps, total: int, chance: random.Random) -> Steps:
    """One computed step elsewhere, mostly near; in one case of ten two anywhere."""
    fixed = fixed_steps(len(steps))
    movable, free = list(steps[fixed:]), sorted({*range(fixed, total)} - {*steps})
    if not movable or not free:
        return steps
    if chance.random() < 0.9 or len(movable) < 2 or len(free) < 2:
        source = chance.choice(movable)
        near = [t for t in free if abs(t - source) <= NEAR] if chance.random() < 0.7 else []
        return _moved(steps, [source], [chance.choice(near or free)])
    return _moved(steps, chance.sample(movable, 2), chance.sample(free, 2))


def neighbours(steps: Steps, total: int, chance: random.Random) -> list[Steps]:
    """Every computed step moved by up to three, then each to two places anywhere."""
    fixed, taken = fixed_steps(len(steps)), {*steps}
    movable = steps[fixed:]
    near = [(s, t) for s in movable for t in range(max(fixed, s - NEAR), min(total, s + NEAR + 1))]
    far = [(s, chance.choice(range(fixed, total))) for s in movable for _ in range(2)]
    return list(dict.fromkeys(_moved(steps, [s], [t]) for s, t in near + far if t not in taken))


def _moved(steps: Steps, sources: Sequence[int], targets: Sequence[int]) -> Steps:
    return tuple(sorted({*steps} - {*sources} | {*targets}))
