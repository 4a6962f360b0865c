"""Tuned plans: which steps are best evaluated on a model with a sampler and a number of steps.

A small JSON file, made by `tuning.py`. Those that are shipped lie in `h2cache/tuned_plans`, a user's own in
the cache folder; a file can also be passed to somebody else and named in `PlanConfig(file=...)`.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from glob import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from h2cache.expected import PLACES, Estimate, Gap, Weights, between, compared
from h2cache.schedule import Course

SHIPPED = Path(__file__).parent / "tuned_plans"
NINE_IN_TEN = 1.28  # standard deviations below the mean, of a normal distribution
COMMAND = "python -m analysis.tune --model FOLDER --prompts FILE, in a checkout of the repository"


@dataclass(frozen=True)
class Quality:
    """Fidelity of a plan to the uncached pictures, PSNR in dB of 8-bit pictures."""

    pictures: int
    mean: float
    worst: float
    deviation: float  # standard deviation over pictures

    @property
    def low(self) -> float:
        """What about nine in ten pictures reach."""
        return self.mean - NINE_IN_TEN * self.deviation

    @classmethod
    def of(cls, values: Sequence[float]) -> Quality:
        mean = math.fsum(values) / len(values)
        spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))
        return cls(len(values), round(mean, 2), round(min(values), 2), round(spread, 2))


@dataclass(frozen=True)
class TunedPlan:
    """The best steps found for one number of evaluations."""

    steps: tuple[int, ...]
    tuning: Quality  # on the pictures that the search has seen
    held_out: Quality | None = None  # on others
    trust: float | None = 1.0  # in the line, as `PlanConfig.trust`
    changes: tuple[float, ...] = ()  # usual, of the output over each gap
    errors: tuple[float, ...] = ()  # usual, of a line over each gap
    weights: Weights = ()  # what its gaps mean for a picture

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """As they usually are; empty: not known."""
        if not len(self.changes) == len(self.errors) == len(self.steps) - 1:
            return ()
        between = zip(pairwise(self.steps), self.changes, self.errors, strict=True)
        return tuple(Gap(*steps, change, error) for steps, change, error in between)

    def gaps_after(self, step: int) -> tuple[Gap, ...]:
        """As they usually are where it is taken up after an evaluation at `step`."""
        after = [s for s in self.steps if s > step]
        ends = pairwise([step, *after])
        known = {(gap.start, gap.end): gap for gap in self.gaps}
        return tuple(known.get(own) or between(self.gaps, *own) for own in ends)

    @property
    def evaluations(self) -> int:
        return len(self.steps)

    @property
    def mean(self) -> float:
        return (self.held_out or self.tuning).mean

    @property
    def low(self) -> float:
        return (self.held_out or self.tuning).low


@dataclass(frozen=True)
class Expectation:
    """What to expect of a picture by a tuned plan, from its start or taken up in mid-run."""

    estimate: Estimate
    plan: TunedPlan
    usual: tuple[Gap, ...]  # of the whole run
    steps: int

    @property
    def error(self) -> float:
        """Root mean square, dB."""
        return self.estimate.weighted_error if self._from_its_start else self.estimate.error

    def psnr(self, gaps: Sequence[Gap]) -> float:
        """PSNR in dB of a picture with these gaps."""
        if not self._from_its_start:
            return self.plan.mean + self.estimate.ahead(gaps, self.usual)
        usual, *weights = self.plan.weights
        return usual + float(compared(gaps, self.usual, self.steps) @ np.array(weights))

    @property
    def _from_its_start(self) -> bool:
        return self.usual == self.plan.gaps


@dataclass(frozen=True)
class Tuned:
    """The plans of one model, sampler and number of steps."""

    model: str  # last part of its folder or hub id
    sampler: str  # class of the scheduler
    levels: tuple[float, ...]  # noise at each step and after the last
    plans: tuple[TunedPlan, ...]  # by rising number of evaluations
    estimate: Estimate | None = None
    size: str = ""
    made: dict[str, Any] = field(default_factory=dict, hash=False)  # command, machine, versions, prompts

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    def fits(self, course: Course) -> bool:
        """Whether the sampler and the noise levels are those that were tuned."""
        same = course.sampler == self.sampler and len(course.levels) == len(self.levels)
        return same and max(abs(a - b) for a, b in zip(course.levels, self.levels, strict=True)) < 2e-3

    def plan(self, evaluations: int) -> TunedPlan | None:
        return next((plan for plan in self.plans if plan.evaluations == evaluations), None)

    def reaching(self, psnr: float) -> TunedPlan | None:
        """The fastest plan that keeps `psnr` in about nine pictures of ten; None: not one does."""
        return next((plan for plan in self.plans if plan.low >= psnr), None)

    def elsewhere(self, course: Course) -> str:
        """In what `course` is another one than that which was tuned."""
        if course.sampler != self.sampler:
            return f"tuned with {self.sampler}, not measured with {course.sampler}"
        if course.steps != self.steps:
            return f"tuned at {self.steps} steps, not measured at {course.steps}"
        return "tuned at other noise levels (another size or shift), not measured at these"

    def expectation(
        self, plan: TunedPlan, before: tuple[Gap, ...] = (), start: int | None = None
    ) -> Expectation | None:
        """How the fidelity of a picture by `plan` is estimated; None: that was not learnt.

        before: the usual gaps of other plans, up to where this one was taken up. start: the evaluation from
        which on it is followed; None: the last one before.
        """
        known = self.estimate
        if known is None or not plan.weights or not plan.gaps:
            return None
        if start is None:
            start = before[-1].end if before else 0
        usual = (*before, *plan.gaps_after(start))
        return Expectation(known, plan, usual, self.steps)

    def corrected(self, now: Expectation, psnr: float, pictures: Sequence[Sequence[Gap]]) -> Expectation:
        """The plan to go on with where pictures, by their gaps so far, are not expected to reach `psnr`."""
        before = tuple(gap for gap in now.usual if gap.end <= pictures[0][-1].end)
        ahead = min(now.estimate.ahead(gaps, before) for gaps in pictures)
        if now.plan.mean + ahead >= psnr:
            return now
        denser = [plan for plan in self.plans if plan.evaluations > now.plan.evaluations]
        plan = next((plan for plan in denser if plan.mean + ahead >= psnr), self.plans[-1])
        return (None if plan is now.plan else self.expectation(plan, before)) or now

    def transfer(self, plan: TunedPlan, course: Course) -> tuple[int, ...] | None:
        """The steps of `course` nearest to the plan's noise levels; None if two fall on one."""
        own = course.levels[: course.steps]
        near = [min(range(course.steps), key=lambda s: abs(own[s] - self.levels[t])) for t in plan.steps]
        return tuple(near) if near[0] == 0 and len(set(near)) == len(near) else None

    @property
    def file_name(self) -> str:
        return f"{self.model}-{self.sampler}-{self.steps}.json"

    def save(self, path: Path) -> Path:
        """Write the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
        _read.cache_clear()
        return path

    @classmethod
    def load(cls, path: Path | str) -> Tuned:
        """Read a file; ValueError names it if it is none."""
        try:
            facts = json.loads(Path(path).read_text(encoding="utf-8"))
            plans = tuple(_plan(plan) for plan in facts.pop("plans"))
            estimate = facts.pop("estimate", None)
            levels = tuple(facts.pop("levels"))
            plans = tuple(sorted(plans, key=lambda plan: plan.evaluations))
            for plan in plans:
                _check(plan, len(levels) - 1)
            return cls(plans=plans, levels=levels, estimate=estimate and _estimate(estimate), **facts)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no file of tuned plans ({error}): make one with {COMMAND}") from None


def _plan(facts: dict[str, Any]) -> TunedPlan:
    held_out, trust = facts.get("held_out"), facts.get("trust", 1.0)
    held = held_out and Quality(**held_out)
    changes, errors, weights = (tuple(facts.get(name, ())) for name in ("changes", "errors", "weights"))
    if len(weights) != 1 + 2 * len(PLACES):
        weights = ()  # of another version
    return TunedPlan(tuple(facts["steps"]), Quality(**facts["tuning"]), held, trust, changes, errors, weights)


def _check(plan: TunedPlan, steps: int) -> None:
    """ValueError if `plan` cannot be followed in a run of so many steps."""
    own = plan.steps
    if not all(type(step) is int for step in own) or not own or own[0] != 0 or own[-1] >= steps:
        raise ValueError(f"steps {own} of {steps}: whole numbers are needed, from 0 to below {steps}")
    if any(b <= a for a, b in pairwise(own)):
        raise ValueError(f"steps {own}: they must rise")
    if plan.trust is not None and not 0 <= plan.trust <= 1:
        raise ValueError(f"trust {plan.trust} is out of range [0, 1]")
    numbers = (plan.mean, plan.low, *plan.changes, *plan.errors, *plan.weights)
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"the plan of {plan.evaluations} evaluations holds numbers that are not finite")


def _estimate(facts: dict[str, Any]) -> Estimate:
    return Estimate(**{f.name: facts[f.name] for f in fields(Estimate) if f.name in facts})


def user_folder() -> Path:
    """Where tuned plans of this user are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "h2cache" / "plans"


@lru_cache(maxsize=128)
def _read(path: Path, stamp: float) -> Tuned:
    return Tuned.load(path)


def known(model: str) -> Iterator[Tuned]:
    """All tuned plans of `model`: the user's own first. A broken file is passed by, with a warning."""
    for folder in (user_folder(), SHIPPED):
        for path in sorted(folder.glob(f"{escape(model)}-*.json")) if model else ():
            try:
                tuned = _read(path, path.stat().st_mtime)
            except (ValueError, OSError) as error:
                warnings.warn(f"h2cache: not used: {error}", stacklevel=2)
                continue
            if tuned.model == model:
                yield tuned


def find(model: str, course: Course) -> Tuned | None:
    """The tuned plans of `model` for the sampler of `course`; of another number of steps if need be."""
    found = [tuned for tuned in known(model) if tuned.sampler == course.sampler]
    exact = [tuned for tuned in found if tuned.fits(course)]
    return min(exact or found, key=lambda tuned: abs(tuned.steps - course.steps), default=None)
