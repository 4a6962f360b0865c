"""H2-Cache that plans ahead: the forecast's own error says when to compute next, and no head runs between.

Ours. At a computed step both stages know what their forecast would have said, so its error is known exactly
and for nothing. Like the step size of an ODE solver, the distance to the next computed step is chosen such
that the error there comes out at the threshold: an error of order p + 1 in the distance g gives
g' = g (tau / error)^(1 / (p + 1)), for the stage that allows the least. Between computed steps both stages
are forecast together, from the sum of their residuals. Neither is computed without the other: a detail stage
that sees the true structure at one step and a forecast one at the next jumps, which no forecast follows. The
error of each stage is measured on its pooled residuals.

The error counts by the length of the sampler's step, relative to the mean so far: that much of it reaches the
latents. The samples of a batch share one plan, that of the most demanding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from h2cache import weights
from h2cache.method import Method
from h2cache.predictors import Forecast, weighted_sum
from h2cache.similarity import pooled_summary, relative_l1
from h2cache.stages import Run, Skip, Stream

if TYPE_CHECKING:
    from h2cache.h2 import H2Config
    from h2cache.memory import Memory
    from h2cache.stages import Program, Ran, Span

FIRST_GAP = 2  # steps from the first computed step to the second
GROWTH = 2.0  # a gap is at most this many times the one before, and at least its inverse


@dataclass
class Plan:
    """When the next step is computed; one for a request and branch."""

    due: int = 0  # step
    first: int = 0  # step computed first
    last: int = 0  # step computed last
    gap: int = 0  # steps between the last two computed ones
    computed: int = 0
    start: float = 0.0  # time of the first step, on the noise clock


class H2Ahead(Method):
    """Both stages, one plan."""

    config: H2Config

    def step(self, stages: tuple[Span, ...], memory: Memory) -> Program:
        """One denoising step of one branch."""
        cfg, step = self.config, memory.step  # the step first: asking may show that a new request began
        at, plan = memory.time(cfg.clock), memory.slot("plan", Plan).predictor
        due = step >= plan.due or memory.in_warmup(cfg.warmup_steps) or memory.in_last(cfg.last_steps)
        both = memory.slot("both", self._new_forecast).predictor
        if not due:
            yield Skip(range(stages[-1].last), both.predict(at, span=memory.span))
            for n, stage in enumerate(stages):
                memory.record(stage, None, None, "forced" if n else "hit")
            return
        foreseen = plan.computed > self.exponent - 1  # residuals enough for a forecast of this order
        rows = both.rows(at) if foreseen else []
        errors, residual = [], None
        for stage, pool in zip(stages, (cfg.pool1, cfg.pool2), strict=True):
            ran = yield Run(stage.blocks)
            residual = ran.residual if residual is None else residual + ran.residual
            summary = self._summary(stage, ran, pool, memory.targets)
            known = memory.slot(stage.name, partial(Forecast, weights.last, both.history)).predictor
            if foreseen:  # the forecast of what is pooled is the forecast, pooled
                errors.append(relative_l1(summary, weighted_sum(known.residuals, rows).img))
            known.learn(Stream(summary), at=at)
        both.learn(residual, at=at)
        measured = self._measured(errors, plan, memory)
        self._plan(plan, measured, memory)
        for stage, tau, found in zip(stages, (cfg.tau1, cfg.tau2), measured or (None, None), strict=True):
            memory.record(stage, None if found is None else [found], [tau], "miss")

    @property
    def exponent(self) -> int:
        """The error of a forecast grows with this power of the distance."""
        polynomial = self.config.predictor in ("taylor", "newton", "hermite", "taylor_scaled")
        return 1 + (self.config.order if polynomial else self.config.predictor != "last")

    def _new_forecast(self) -> Forecast:
        cfg = self.config
        return Forecast(weights.last, 1) if cfg.predictor == "last" and not cfg.repay else cfg.new_predictor()

    def _summary(self, stage: Span, ran: Ran, pool: int, targets: slice | None) -> Tensor:
        """The stage's residual of the tokens that are drawn, pooled like the paper's checks."""
        residual = ran.residual
        drawn = Stream(residual.img[:, targets or slice(None)], residual.txt)
        return pooled_summary(drawn.joint if stage.joint else drawn.img, pool)

    def _measured(self, errors: list[Tensor], plan: Plan, memory: Memory) -> list[float] | None:
        """The largest error of each stage over the batch, weighed by the length of the step; one wait."""
        if not errors:
            return None
        values = memory.read(torch.cat(errors))  # of both stages, sample by sample
        passed = memory.time("sigma") - plan.start  # on the noise clock, in `step` steps
        weight = memory.span * (memory.step - plan.first) / passed if passed else 1.0
        stages = [values[n : n + memory.batch] for n in range(0, len(values), memory.batch)]
        return [weight * (math.nan if any(map(math.isnan, v)) else max(v)) for v in stages]

    def _plan(self, plan: Plan, errors: list[float] | None, memory: Memory) -> None:
        cfg, step = self.config, memory.step
        if plan.computed == 0:
            plan.start, plan.first = memory.time("sigma"), step
        else:
            plan.gap = step - plan.last
        plan.last = step
        plan.computed += 1
        if min(cfg.tau1, cfg.tau2) <= 0:
            wanted = 1.0
        elif errors is None:
            wanted = plan.gap * GROWTH or FIRST_GAP
        elif not all(map(math.isfinite, errors)):
            wanted = 1.0
        else:
            taus = (cfg.tau1, cfg.tau2)
            ratio = min(tau / e if e else math.inf for tau, e in zip(taus, errors, strict=True))
            factor = min(max(ratio ** (1 / self.exponent), 1 / GROWTH), GROWTH)
            wanted = plan.gap * factor
        limit = math.inf if cfg.max_consecutive_hits is None else cfg.max_consecutive_hits + 1
        plan.due = step + max(1, round(min(wanted, limit)))
