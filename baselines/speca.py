"""SpeCa: TaylorSeer drafts the coming steps, and one block, really computed, says how long a draft may go on.

Source: arXiv 2509.11628 (ACM MM 2025) and the authors' code. The last block is computed on the drafted input
and compared with its own draft; the tolerance falls along the run. As in the code, a draft that fails is
still used, and the step after it is computed.
Deviations: errors in float32, a non-finite one rejects, progress is step / steps for every model. One error
is taken over the whole batch, as by the authors: its images are computed at the same steps, and may come
out otherwise than alone. The elementwise error divides by numbers close to 0, here as in the authors' code:
a difference of 2e-6 in can be 125 % out, so its decisions need not repeat on another machine.
measure="norm" is recommended.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from h2cache import weights
from h2cache.forecasting import GRANULARITIES, ModuleForecast, forecast_bytes
from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig, Shape, check
from h2cache.predictors import Forecast
from h2cache.program import Drive, Program, Run, Skip, Stage


@dataclass(frozen=True)
class SpeCaConfig(MethodConfig):
    """Settings of SpeCa. The authors' for FLUX.1-dev at 50 steps are the defaults."""

    name = "speca"
    instead = ': use granularity="stage"'

    base: float = 7.0
    """Tolerance at the first step, a relative error > 0. Higher: longer drafts, faster."""
    decay: float = 0.3
    """The tolerance falls to this share of `base` by the last step, in (0, 1]."""
    floor: float = 0.1
    """The tolerance never falls below this."""
    min_drafts: int = 2
    """Drafts in a row before the first check, >= 1."""
    max_drafts: int = 8
    """Drafts in a row at most; one of a pair with `min_drafts`. 0: always compute."""
    warmup_steps: int = 3
    """First steps: computed, unless the step before was (the authors' rule: with 3, steps 0 and 2)."""
    order: int = 2
    """Order of the Taylor polynomial, 0 to 4."""
    measure: str = "element"
    """"element": mean |draft - real| / |real| as the authors; "norm" [ours]: mean |draft - real| / mean
    |real|, which asks for other tolerances (0.05 to 0.3)."""
    granularity: str = "module"
    """"module" as the authors, or "stage" [ours], see `taylorseer.py`."""

    def __post_init__(self) -> None:
        check("base", self.base, 0.0, math.inf, "it is a relative error")
        check("floor", self.floor, 0.0, math.inf, "it is a relative error")
        check("decay", self.decay, 0.0, 1.0, "it is a share")
        check("min_drafts", self.min_drafts, 1, math.inf, "it counts steps")
        check("max_drafts", self.max_drafts, 0, math.inf, "it counts steps; 0 switches off")
        check("warmup_steps", self.warmup_steps, 1, math.inf, "the first step must be computed")
        check("order", self.order, 0, 4, "higher differences are noise")
        for field, choices in (
            ("measure", ("element", "norm")),
            ("granularity", GRANULARITIES),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field}={getattr(self, field)!r} is unknown: choose one of {choices}")

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"modules"} if self.granularity == "module" else ())

    @property
    def needs_total_steps(self) -> bool:
        return True

    def tolerance(self, step: int, total: int) -> float:
        """The largest error that lets a draft go on."""
        return max(self.base * self.decay ** (step / total), self.floor)

    def bytes_needed(self, shape: Shape) -> int:
        return forecast_bytes(shape, self.granularity, self.order + 1, stages=3)

    def build(self) -> SpeCa:
        return SpeCa(self)


class Draft:
    """How far the present draft has gone; the authors' scheduler."""

    def __init__(self) -> None:
        self.last_full: bool | None = None
        self.count = 0  # drafts in a row
        self.error: Tensor | float | None = None  # measured at the step before; None: not measured

    def decide(self, step: int, total: int, cfg: SpeCaConfig) -> tuple[bool, bool]:
        """Whether `step` is computed, and whether a drafted one is checked."""
        if self.last_full is None:  # nothing to draft from: the beginning, or all has been forgotten
            full, checked = True, False
        elif self.last_full and cfg.max_drafts > 0:  # also within the warm-up
            full, checked = False, False
        else:
            checked = self.count >= cfg.min_drafts
            due = step < cfg.warmup_steps or self.count >= cfg.max_drafts
            full = due or (checked and self.failed(step, total, cfg))
        self.last_full = full
        self.count = 0 if full else self.count + 1
        self.error = None
        return full, checked and not full

    def failed(self, step: int, total: int, cfg: SpeCaConfig) -> bool:
        """Whether the error measured before `step` is above its tolerance; waits for it."""
        return self.error is not None and not float(self.error) <= cfg.tolerance(step, total)


def error_of(
    draft: Tensor, real: Tensor, measure: str, total: Callable[[Tensor], Tensor] = lambda sums: sums
) -> Tensor:
    """One relative error for the batch, a float32 number on the device.

    total: sums over all processes where each has some of the tokens.
    """
    difference, size = (draft.float() - real.float()).abs(), real.float().abs()
    if measure == "norm":
        error, whole = difference.sum(), size.sum()
    else:
        error, whole = (difference / (size + 1e-10)).sum(), size.new_tensor(size.numel())
    error, whole = total(torch.stack([error, whole]))
    return error / whole


class SpeCa(Method):
    """Draft, check, and compute where the check fails."""

    config: SpeCaConfig

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One denoising step of one branch."""
        cfg, step = self.config, memory.step  # the step first: asking may show that a new request began
        draft = memory.state("draft", Draft)
        full, checked = draft.decide(step, memory.total_steps, cfg)
        alone = full and step < cfg.warmup_steps - 1
        drive = self._modules if cfg.granularity == "module" else self._stages
        yield from drive(stages, memory, draft, full, checked, alone)
        memory.record_stack(stages, None, 0.0, not draft.last_full)

    def _modules(self, stages, memory, draft: Draft, full: bool, checked: bool, alone: bool) -> Program:
        cfg, end, at = self.config, stages[-1].last, float(memory.step)
        rule = partial(weights.taylor, order=cfg.order)
        modules = memory.state("modules", lambda: ModuleForecast(rule, cfg.order + 1))
        if full:
            if alone:
                modules.clear()
            yield from modules.compute(stages, at)
            return
        modules.begin_forecast(at)
        yield Drive(range(end - 1 if checked else end), modules.predict, counts=False)
        if not checked:
            return

        def compare(index: int, name: str, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
            guess = modules.predict(index, name, forward, args, kwargs)
            real = forward(*args, **kwargs)
            first, truth = (x if isinstance(x, Tensor) else x[0] for x in (guess, real))
            draft.error = error_of(
                first, truth, cfg.measure, memory.total
            )  # of the last module: the block's end
            return guess

        yield Drive(range(end - 1, end), compare, counts=True)

    def _stages(self, stages, memory, draft: Draft, full: bool, checked: bool, alone: bool) -> Program:
        cfg, end, at = self.config, stages[-1].last, float(memory.step)
        parts = {stage.name: range(stage.first, min(stage.last, end - 1)) for stage in stages}
        for name, blocks in (parts | {"last block": range(end - 1, end)}).items():
            rule = partial(weights.taylor, order=cfg.order)
            slot = memory.slot(name, lambda rule=rule: Forecast(rule, cfg.order + 1))
            if not len(blocks):
                continue
            if full:
                ran = yield Run(blocks)
                if alone:
                    slot.clear()
                slot.predictor.learn(ran.residual, at=at)
                continue
            guess = slot.predictor.predict(at)
            if checked and name == "last block":
                ran = yield Run(blocks, kept=[True] * memory.batch, stand_in=guess)
                draft.error = error_of(guess.joint, ran.residual.joint, cfg.measure, memory.total)
            else:
                yield Skip(blocks, guess)
