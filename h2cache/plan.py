"""The plan: ask for a speed, and get exactly that many evaluations of the model (ours).

Which steps are evaluated is settled before the first one (`grid.py`, or a tuned file). At the others the
model's **output** is forecast: a line through the last two outputs over the noise level. What a forecast got
wrong is seen as soon as the next evaluation is there, and is paid back over the steps that follow it. How far
the line is followed is measured too: outputs that turn are reused, not extrapolated. No thresholds, no
blocks, no wait for the device.

This is a predictor and a corrector (Adams-Bashforth, Adams-Moulton) on a subset of the sampler's own steps.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field, replace
from itertools import pairwise

from torch import Tensor

from h2cache import tuned
from h2cache.expected import Estimate, Gap, Seen, gaps_of
from h2cache.grid import default_steps
from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig, Shape, check
from h2cache.outputs import HELD, Outputs
from h2cache.program import Forward, Program, Stage, Stand
from h2cache.schedule import Course

USUAL_SPEEDUP = 5.0
STOCHASTIC = "the sampler draws fresh noise at its steps, so what a forecast gets wrong is paid back in part"
NO_FLOW = "target='ode' is for flow samplers with one evaluation a step: 'sampler' is taken here"
NO_WEIGHTS = "the quality is not corrected in the run: too few pictures were measured, tune with 8 held_out"
HARDER = "harder than usual: it went on with a plan of more evaluations"
TWO_DENOISERS = "the quality is not corrected in the run: the pipeline has two denoisers"
FEWEST_STEPS = 5  # below that a speed-up leaves too little to forecast from: nothing is skipped


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
    """Fidelity to the uncached picture that about nine pictures of ten should reach, in dB; the fastest tuned
    plan that does is taken. Needs tuned plans: see `tuning.py`."""
    steps: tuple[int, ...] = ()
    """The evaluated steps themselves, rising from 0."""
    target: str = "sampler"
    """"sampler": as near as possible to the picture of all steps. "ode": to that of infinitely many steps;
    for Euler samplers, whose own error at 50 steps is larger than the plan's."""
    file: str = ""
    """Tuned plans to use, a JSON file; empty: those of the model, the sampler and the number of steps, from
    the user's cache or shipped with the package; "none": no tuned plan, always the default grid."""
    trust: float | None = None
    """How far the line through the last two outputs is followed, 0 (the newest output is reused) to 1; None:
    as the tuned plan says, else measured at each evaluation, image by image."""
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
            check("psnr", self.psnr, 10.0, 100.0, "it is in dB; 30: similar, 50: differences are hard to see")
        if self.steps and (self.steps[0] != 0 or any(b <= a for a, b in pairwise(self.steps))):
            raise ValueError(f"steps={self.steps}: they must rise, and begin with step 0")
        if self.trust is not None:
            check("trust", self.trust, 0.0, 1.0, "1 follows the line, 0 reuses the newest output")
        if self.target not in ("sampler", "ode"):
            raise ValueError(f"target={self.target!r} is unknown: choose 'sampler' or 'ode'")
        if self.psnr is not None and not self._as_tuned:
            raise ValueError(
                f"psnr={self.psnr} with trust={self.trust}, target={self.target!r}: a quality is known for "
                "plans as they were tuned; leave trust and target out, or ask for a speed"
            )

    @property
    def _as_tuned(self) -> bool:
        """Whether tuned plans are followed as they were measured."""
        return self.trust is None and self.target == "sampler"

    @property
    def needs_total_steps(self) -> bool:
        return True

    @property
    def wanted_psnr(self) -> float | None:
        return self.psnr

    def for_checkpoint(self, checkpoint: str | None) -> PlanConfig:
        config = replace(self, model=self.model or checkpoint or "")
        if self.file not in ("", "none"):
            tuned.Tuned.load(self.file)  # refuses a file that is none
        elif self.psnr is not None and not any(tuned.known(config.model)):
            raise ValueError(
                f"psnr={self.psnr}: no tuned plans of {config.model or 'this model, which has no name'} are "
                f"known, so it is not known what a speed costs there. Make them with {tuned.COMMAND}, or "
                "h2cache.tune(pipe, prompts), or name a file that has some, "
                f"PlanConfig(psnr={self.psnr}, file=...); without them ask for a speed, as in speedup=4"
            )
        return config

    def choose(self, course: Course) -> Choice:
        """The evaluated steps of a request, and what is known about them."""
        if self.steps:
            own = {*(s for s in self.steps if s < course.steps), *course.starts}
            return Choice(tuple(sorted(own)), trust=self.trust)
        table = None if self.file == "none" else self._table(course)
        estimate = table.estimate if table is not None and self._as_tuned else None
        if self.psnr is not None:
            if table is None:
                raise ValueError(
                    f"psnr={self.psnr}: there are tuned plans of {self.model}, but not for "
                    f"{course.sampler}: make some with {tuned.COMMAND}"
                )
            best = table.reaching(self.psnr)
            if best is None:
                return Choice(tuple(range(course.steps)), None, f"no tuned plan keeps {self.psnr} dB")
            if table.fits(course):
                return self._chasing(course, table, best, self.psnr)
            count = best.evaluations
        elif self.evaluations is not None:
            count = self.evaluations
        elif course.steps < FEWEST_STEPS:
            return Choice(tuple(range(course.steps)), None, f"too few steps to skip any ({course.steps})")
        else:
            count = max(1, round(course.steps / (self.speedup or USUAL_SPEEDUP)))
        count = min(max(count, len(course.starts)), course.steps)
        plan = None if table is None else table.plan(count)
        if table is None or plan is None:
            return Choice(default_steps(course, count), estimate, trust=self.trust)
        trust = self.trust_of(plan)
        if table.fits(course):
            known = table.expectation(plan) if self._as_tuned else None
            return Choice(plan.steps, known or estimate, trust=trust)
        steps, note = table.transfer(plan, course), table.elsewhere(course)
        if steps is None or not {*course.starts} <= {*steps}:
            return Choice(default_steps(course, count), estimate, f"{note}: the default grid", self.trust)
        return Choice(steps, estimate, note, trust)

    def _chasing(self, course: Course, table: tuned.Tuned, best: tuned.TunedPlan, psnr: float) -> Choice:
        """A tuned plan that keeps a quality, corrected in the run where it can be."""
        known = table.expectation(best)
        if known is None or len(course.starts) > 1:
            why = NO_WEIGHTS if known is None else TWO_DENOISERS
            return Choice(best.steps, known or table.estimate, why, self.trust_of(best))
        return Choice(best.steps, known, trust=self.trust_of(best), chase=Chase(table, known, psnr))

    def trust_of(self, plan: tuned.TunedPlan) -> float | None:
        return plan.trust if self.trust is None else self.trust

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
    estimate: Estimate | tuned.Expectation | None = None  # of the picture's fidelity
    note: str = ""  # what the user should know
    trust: float | None = None  # in the line; None: measured
    chase: Chase | None = None


@dataclass
class Chase:
    """A wanted quality: in mid-run another tuned plan is taken where a picture's errors are not the usual."""

    table: tuned.Tuned
    expected: tuned.Expectation
    psnr: float
    gaps: list[tuple[Gap, ...]] = field(default_factory=list)  # so far, of each picture

    def see(self, step: int, seen: Seen) -> None:
        """What an evaluation of the first guidance branch shows; a wait."""
        new = gaps_of([(step, seen)])
        same = len(new) == len(self.gaps)  # else it is the first, or the batch has changed in mid-run
        self.gaps = [a + b for a, b in zip(self.gaps, new, strict=True)] if same else new
        self.expected = self.table.corrected(self.expected, self.psnr, self.gaps)

    def begin_again(self, step: int) -> None:
        """What was kept is gone: the next gap begins with the evaluation at `step`."""
        last = self.gaps[0][-1].end if self.gaps else 0
        before = tuple(gap for gap in self.expected.usual if gap.end <= last)
        self.expected = self.table.expectation(self.expected.plan, before, step) or self.expected


class Plan(Method):
    """Evaluate at the planned steps, forecast at the others."""

    config: PlanConfig

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One denoising step of one branch."""
        step, run = memory.course_step, memory.state("plan", lambda: self._begin(memory))
        if run.outputs.skips(step) and run.outputs.ready(step):
            yield Stand(run.outputs.stand_in(step))
            memory.record_whole("hit")
            return
        if run.outputs.skips(step):  # guidance was off when this branch should have been evaluated
            memory.clear_slots()
            run = memory.state("plan", lambda: self._begin(memory))
        output = yield Forward()
        kept = [part.detach().clone() for part in output]  # CUDA graphs use theirs again
        seen = memory.by_picture(run.outputs.learn(step, kept))
        memory.record_whole("miss", seen)
        if run.chase is not None:
            self._follow(run, run.chase, memory, seen)

    def _follow(self, run: Run, chase: Chase, memory: Memory, seen: Seen | None) -> None:
        """Take another tuned plan from here on, the same in all branches, if the errors of one ask for it."""
        if seen is not None and memory.is_first_branch:
            chase.see(memory.course_step, seen)
            memory.expect(chase.expected, "" if chase.expected.plan is run.plan else HARDER)
        plan = chase.expected.plan
        if plan is not run.plan:
            step, run.plan = memory.course_step, plan
            run.outputs.replan(step, [s for s in plan.steps if s > step], self.config.trust_of(plan))

    def _begin(self, memory: Memory) -> Run:
        """The plan from the current step on: the first, unless something changed in mid-run."""
        course, now = memory.course, memory.course_step
        choice = memory.shared("choice", lambda: self._choose(memory))
        chase, steps, trust = choice.chase, choice.steps, choice.trust
        plan = None if chase is None else chase.expected.plan
        if chase is not None and plan is not None:
            steps, trust = plan.steps, self.config.trust_of(plan)
            if now > 0 and memory.is_first_branch:
                chase.begin_again(now)
                memory.expect(chase.expected, "")
        end = min([s for s in course.starts if s > now], default=course.steps)
        own = (now, *(s for s in steps if now < s < end))
        target = self.config.target if course.adds_up else "sampler"
        return Run(Outputs(course, own, end, target, trust, memory.batch), chase, plan)

    def _choose(self, memory: Memory) -> Choice:
        """The evaluated steps of a request, all branches the same; what its user should know is noted."""
        course = memory.course
        choice = self.config.choose(course)
        skips = len(choice.steps) < course.steps
        drawn = course.stochastic and skips
        other = self.config.target == "ode" and not course.adds_up
        note = "; ".join(filter(None, [choice.note, drawn * STOCHASTIC, other * NO_FLOW]))
        memory.expect(choice.estimate if skips else None, note)
        if note and (drawn or not skips):
            warnings.warn(f"h2cache, plan: {note}", stacklevel=2)  # Python shows it once
        return choice


@dataclass
class Run:
    """A branch's outputs, and whether its plan may still change."""

    outputs: Outputs
    chase: Chase | None = None
    plan: tuned.TunedPlan | None = None  # that is followed, where a quality is wanted

    @property
    def outputs_kept(self) -> list[list[Tensor]]:
        return self.outputs.outputs_kept
