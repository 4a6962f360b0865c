"""The plan: ask for a speed, and get exactly that many evaluations of the model (ours).

Which steps are evaluated is settled before the first one (`grid.py`, or a tuned file). At the others the
model's **output** is forecast: a line through the last two outputs over the noise level. What a forecast got
wrong is seen as soon as the next evaluation is there, and is paid back over the steps that follow it. No
thresholds, no blocks, no wait for the device.

This is a predictor and a corrector (Adams-Bashforth, Adams-Moulton) on a subset of the sampler's own steps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from h2cache import tuned
from h2cache.grid import default_steps
from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig, Shape, check
from h2cache.predictors import combine
from h2cache.program import Forward, Program, Stage, Stand
from h2cache.schedule import Course
from h2cache.weights import newton

HELD = 3  # outputs that a branch keeps
USUAL_SPEEDUP = 5.0
LEAST = 1 / 20  # distance of two outputs, of the way to where they are asked for, that still makes a line
STOCHASTIC = "the sampler draws fresh noise at its steps, so what a forecast gets wrong is paid back in part"
NO_FLOW = "target='ode' is for flow samplers with one evaluation a step: 'sampler' is taken here"
FEWEST_STEPS = 5  # below that a speed-up leaves too little to forecast from: nothing is skipped

Weights = dict[int, float]  # step to weight of its output


@dataclass(frozen=True)
class PlanConfig(MethodConfig):
    """Settings of the plan: one of `speedup`, `evaluations`, `psnr` or `steps`; else a speed-up of 5."""

    name = "plan"
    requires = frozenset({"whole"})
    outputs_held = HELD

    speedup: float | None = None
    """How many times fewer evaluations, >= 1. The number of evaluations is steps / speedup, rounded."""
    evaluations: int | None = None
    """Evaluations of the model in each guidance branch, >= 1. As many as there are steps: nothing changes."""
    psnr: float | None = None
    """Fidelity to the uncached picture that about nine pictures of ten shall reach, in dB; the fastest tuned
    plan that does is taken. Needs tuned plans: see `tuning.py`."""
    steps: tuple[int, ...] = ()
    """The evaluated steps themselves, rising from 0."""
    target: str = "sampler"
    """"sampler": as near as can be to the picture of all steps. "ode": to that of infinitely many steps; for
    Euler samplers, whose own error at 50 steps is larger than the plan's."""
    file: str = ""
    """Tuned plans to use, a JSON file; empty: those of the model, the sampler and the number of steps, from
    the user's cache or shipped with the package; "none": no tuned plan, always the default grid."""
    model: str = ""
    """Whose tuned plans to look for; empty: the name of the folder or hub id that the model came from."""

    def __post_init__(self) -> None:
        asked = [
            wish
            for wish in (self.speedup, self.evaluations, self.psnr, self.steps or None)
            if wish is not None
        ]
        if not asked:
            object.__setattr__(self, "speedup", USUAL_SPEEDUP)
        if len(asked) > 1:
            raise ValueError(
                f"speedup={self.speedup}, evaluations={self.evaluations}, psnr={self.psnr}, "
                f"steps={self.steps}: say one of them"
            )
        if self.speedup is not None:
            check("speedup", self.speedup, 1.0, 1000.0, "it says how many times fewer evaluations")
        if self.evaluations is not None:
            check("evaluations", self.evaluations, 1, math.inf, "the first step is always evaluated")
        if self.psnr is not None:
            check("psnr", self.psnr, 10.0, 100.0, "it is in dB; 30: alike, 50: hardly told apart")
        if self.steps and (self.steps[0] != 0 or any(b <= a for a, b in pairwise(self.steps))):
            raise ValueError(f"steps={self.steps}: they must rise, and begin with step 0")
        if self.target not in ("sampler", "ode"):
            raise ValueError(f"target={self.target!r} is unknown: choose 'sampler' or 'ode'")

    @property
    def needs_total_steps(self) -> bool:
        return True

    def for_checkpoint(self, checkpoint: str | None) -> PlanConfig:
        config = replace(self, model=self.model or checkpoint or "")
        if self.file not in ("", "none"):
            tuned.Tuned.load(self.file)  # refuses a file that is none
        elif self.psnr is not None and not any(tuned.known(config.model)):
            raise ValueError(
                f"psnr={self.psnr}: no tuned plans of {config.model or 'this model, which has no name'} are "
                f"known, so nobody knows what a speed costs there. Make them with {tuned.COMMAND}, or "
                "h2cache.tune(pipe, prompts); without them ask for a speed, as in speedup=4"
            )
        return config

    def choose(self, course: Course) -> Choice:
        """The evaluated steps of a request, and what is known about them."""
        if self.steps:
            return Choice(tuple(sorted({*(s for s in self.steps if s < course.steps), *course.starts})))
        table = None if self.file == "none" else self._table(course)
        estimate = None if table is None else table.estimate
        if self.psnr is not None:
            if table is None:
                raise RuntimeError(
                    f"psnr={self.psnr}: there are tuned plans of {self.model}, but not for "
                    f"{course.sampler}: make some with {tuned.COMMAND}"
                )
            best = table.reaching(self.psnr)
            if best is None:
                return Choice(tuple(range(course.steps)), estimate, f"no tuned plan keeps {self.psnr} dB")
            if table.fits(course) and len(course.starts) == 1:
                return Choice(best.steps, table.expectation(best), chase=Chase(table, best, self.psnr))
            count = best.evaluations
        elif self.evaluations is not None:
            count = self.evaluations
        elif course.steps < FEWEST_STEPS:
            return Choice(tuple(range(course.steps)), estimate, f"too few steps to skip any ({course.steps})")
        else:
            count = max(1, round(course.steps / (self.speedup or USUAL_SPEEDUP)))
        count = min(max(count, len(course.starts)), course.steps)
        plan = None if table is None else table.plan(count)
        if table is None or plan is None:
            return Choice(default_steps(course, count), estimate)
        if table.fits(course):
            return Choice(plan.steps, table.expectation(plan))
        steps = table.transfer(plan, course)
        if steps is None or not {*course.starts} <= {*steps}:
            return Choice(default_steps(course, count), estimate)
        return Choice(steps, estimate, f"tuned at {table.steps} steps, not measured at {course.steps}")

    def _table(self, course: Course) -> tuned.Tuned | None:
        return tuned.Tuned.load(self.file) if self.file else tuned.find(self.model, course)

    def bytes_needed(self, shape: Shape) -> int:
        return HELD * shape.tensor(shape.img, shape.out)

    def build(self) -> Plan:
        return Plan(self)


@dataclass(frozen=True)
class Choice:
    """The evaluated steps of a request."""

    steps: tuple[int, ...]
    estimate: tuned.Estimate | None = None  # of the picture's fidelity
    note: str = ""  # what the user should know
    chase: Chase | None = None


@dataclass
class Chase:
    """A wanted quality: in mid-run another tuned plan is taken where a picture's errors are not the usual."""

    table: tuned.Tuned
    plan: tuned.TunedPlan
    psnr: float
    error: float = 0.0  # sum over the gaps so far, of the worst picture of a batch
    usual: float = 0.0  # the same as it usually is
    step: int = 0  # of the newest evaluation

    def next_steps(self, step: int, error: Tensor) -> tuple[int, ...] | None:
        """The steps to evaluate after `step`, where they are others than before; a wait."""
        self.error += max(error.tolist())  # the one wait of an evaluated step
        self.usual += self.plan.usual(step) - self.plan.usual(self.step)
        self.step, before = step, self.plan
        self.plan = self.table.corrected(self.plan, self.psnr, self.error, self.usual)
        return None if self.plan is before else tuple(s for s in self.plan.steps if s > step)


@lru_cache(maxsize=64)
def stand_ins(
    course: Course, evaluated: tuple[int, ...], end: int, target: str
) -> tuple[dict[int, Weights], dict[int, Weights]]:
    """Weights of the last outputs: of each skipped step's stand-in, and of the error of each gap.

    evaluated: the steps with an output of one denoiser; its steps end before `end`. A stand-in is a line
    through the newest two outputs, plus what the gap before got wrong, spread over this gap. The error is
    that of the gap behind an evaluated step, as the parabola through the newest three sees it.
    """
    levels, lengths = course.levels, course.lengths

    def line(nodes: Sequence[int], step: int) -> Weights:
        return through([(n, levels[n]) for n in nodes], levels[step])

    def summed(nodes: Sequence[int], stretch: range) -> Weights:
        """What the polynomial through `nodes` adds to the sample over `stretch`."""
        if target == "sampler":
            return total(*((lengths[q], line(nodes, q)) for q in stretch))
        a, b = levels[stretch[0]], levels[stretch[-1] + 1]  # Simpson's rule: exact up to cubics
        parts = [through([(n, levels[n]) for n in nodes], x) for x in (a, (a + b) / 2, b)]
        return total(*zip(((b - a) / 6, 4 * (b - a) / 6, (b - a) / 6), parts, strict=True))

    table: dict[int, Weights] = {}
    errors: dict[int, Weights] = {}
    debt: Weights = {}
    for k, here in enumerate(evaluated):
        two, three = evaluated[max(0, k - 1) : k + 1], evaluated[max(0, k - HELD + 1) : k + 1]
        if k:
            behind, guessed = range(evaluated[k - 1], here), evaluated[max(0, k - 2) : k]
            wrong = kept(total((1.0, summed(three, behind)), (-1.0, summed(guessed, behind))), three)
            for old in debt.keys() - {*three}:  # an output that is held no more is read off the oldest two
                debt = total((1.0, debt), (debt.pop(old), line(three[:2], old)))
            debt = kept(total((1.0, debt), (1.0, wrong)), three)
            if any(wrong.values()):
                errors[here] = wrong
        stretch = range(here, evaluated[k + 1] if k + 1 < len(evaluated) else end)
        gap, room = stretch[1:], math.fsum(lengths[q] for q in stretch[1:])
        if not room:  # nothing that could be paid into: the debt waits
            table |= {q: kept(line(two, q), three) for q in gap}
            continue
        straight = total(*((lengths[q], line(two, q)) for q in stretch))
        owed = total((1.0, debt), (1.0, summed(two, stretch)), (-1.0, straight))
        for q in gap:
            table[q] = kept(total((1.0, line(two, q)), (1 / room, owed)), three)
        debt = {}
    return table, errors


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


def kept(weights: Weights, steps: Sequence[int]) -> Weights:
    """`weights` on `steps` alone: what lies on forgotten outputs goes to the oldest, so that sums stay."""
    out = {step: weights.get(step, 0.0) for step in steps}
    out[steps[0]] += math.fsum(w for step, w in weights.items() if step not in out)
    return out


@dataclass
class Outputs:
    """What a branch keeps: the newest outputs, and the table that says how they are added up."""

    table: dict[int, Weights]
    errors: dict[int, Weights]
    end: int  # of the steps that the table is for
    chase: Chase | None = None
    kept: dict[int, list[Tensor]] = field(default_factory=dict)  # by step, oldest first
    evaluated: list[int] = field(default_factory=list)

    @property
    def outputs_kept(self) -> list[list[Tensor]]:
        return list(self.kept.values())

    def weighted(self, weights: Weights) -> list[Tensor]:
        return combine([self.kept[step] for step in weights], list(weights.values()))


class Plan(Method):
    """Evaluate at the planned steps, forecast at the others."""

    config: PlanConfig

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One denoising step of one branch."""
        step, outputs = memory.course_step, memory.state("outputs", lambda: self._begin(memory))
        row = outputs.table.get(step)
        if row is not None and row.keys() <= outputs.kept.keys():
            yield Stand(outputs.weighted(row))
            memory.record_whole("hit")
            return
        if row is not None:  # guidance was off when this branch should have been evaluated
            memory.clear_slots()
            outputs = memory.state("outputs", lambda: self._begin(memory))
        result = yield Forward()
        outputs.kept[step] = [part.detach().clone() for part in result]  # CUDA graphs use theirs again
        for old in sorted(outputs.kept)[:-HELD]:
            del outputs.kept[old]
        outputs.evaluated.append(step)
        weights = outputs.errors.get(step, {})
        seen = bool(weights) and weights.keys() <= outputs.kept.keys()
        error = error_of(outputs.weighted(weights)) if seen else None
        memory.record_whole("miss", error)
        if outputs.chase is not None and error is not None:
            self._follow(outputs, memory, error)

    def _follow(self, outputs: Outputs, memory: Memory, error: Tensor) -> None:
        """Take another tuned plan from here on, if the picture's errors ask for one."""
        chase, course = outputs.chase, memory.course
        assert chase is not None
        steps = chase.next_steps(memory.course_step, error)
        memory.expect(chase.table.beside(chase.plan, chase.usual), "")
        if steps is not None:
            own = (*outputs.evaluated, *steps)
            outputs.table, outputs.errors = stand_ins(course, own, outputs.end, self._target(course))

    def _target(self, course: Course) -> str:
        return self.config.target if course.adds_up else "sampler"

    def _begin(self, memory: Memory) -> Outputs:
        """The plan from the current step on: the first, unless something changed in mid-run."""
        course, now = memory.course, memory.course_step
        choice = self.config.choose(course)
        skips = len(choice.steps) < course.steps
        drawn = course.stochastic and skips
        other = self._target(course) != self.config.target
        note = "; ".join(filter(None, [choice.note, drawn * STOCHASTIC, other * NO_FLOW]))
        memory.expect(choice.estimate, note)
        if note and (drawn or not skips):
            warnings.warn(f"h2cache, plan: {note}", stacklevel=2)  # Python shows it once
        end = min([s for s in course.starts if s > now], default=course.steps)
        own = (now, *(s for s in choice.steps if now < s < end))
        tables = stand_ins(course, own, end, self._target(course))
        return Outputs(*tables, end, choice.chase if now == 0 else None)


def error_of(parts: list[Tensor]) -> Tensor:
    """Root mean square of each sample's values, in float32: (B,)."""
    flat = [p.float().reshape(p.shape[0] if p.ndim > 2 else 1, -1) for p in parts]
    if len({f.shape[0] for f in flat}) > 1 or (len(flat) > 1 and flat[0].shape[0] == 1):
        return torch.stack([f.square().mean().sqrt() for f in flat])  # a list with a tensor for each sample
    return torch.cat(flat, 1).square().mean(1).sqrt()
