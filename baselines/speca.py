"""SpeCa: TaylorSeer drafts the coming steps, and one block, really computed, says how long a draft may go on.

Source: arXiv 2509.11628 (ACM MM 2025) and the authors' code. The last block is computed on the drafted input
and compared with its own draft; the tolerance falls along the run. As in the code, a draft that fails is
still used, and the step after it is computed.
Deviations: errors in float32, a non-finite one rejects, progress is step / steps for every model. Each image
of a batch has its own error and draft, so that it comes out as it would alone; where one is computed, all
blocks run, and the others take their drafts. reduce="mean" is the authors': one error over the whole batch.
Where the last block has attention and mlp apart (DiT, Qwen-Image), the image mlp's output is compared, before
its gate as in FLUX; the authors' DiT code compares the block's, so its tolerances are not for here.
The elementwise error divides by numbers close to 0, here as in the authors' code:
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

from h2cache.forecasting import BASES, GRANULARITIES, ModuleForecast, Rule, forecast_bytes, rule_of
from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig, Shape, check
from h2cache.predictors import Forecast
from h2cache.program import Drive, Program, Run, Skip, Stage

COMPARED = ("total", "ff")  # modules of the last block: both in one, or the image's mlp


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
    """Order of the polynomial, 0 to 4."""
    basis: str = "taylor"
    """"taylor" as the authors, or "hermite": HiCache's polynomials (arXiv 2508.16984), with `sigma`."""
    sigma: float = 0.5
    """Contraction of the Hermite basis, in (0, 1]."""
    measure: str = "element"
    """"element": mean |draft - real| / |real| as the authors; "norm" [ours]: mean |draft - real| / mean
    |real|, which asks for other tolerances (0.05 to 0.3)."""
    reduce: str = "sample"
    """"sample": each image of a batch decides for itself [ours]; "mean": all by one error, as the authors."""
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
        if not 0 < self.sigma <= 1:
            raise ValueError(f"sigma={self.sigma!r} is out of range (0, 1]: it contracts")
        for field, choices in (
            ("measure", ("element", "norm")),
            ("reduce", ("sample", "mean")),
            ("granularity", GRANULARITIES),
            ("basis", BASES),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field}={getattr(self, field)!r} is unknown: choose one of {choices}")

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"modules"} if self.granularity == "module" else ())

    @property
    def needs_total_steps(self) -> bool:
        return True

    @property
    def rule(self) -> Rule:
        """The forecasting rule."""
        return rule_of(self.basis, self.order, self.sigma)

    def tolerance(self, step: int, total: int) -> float:
        """The largest error that lets a draft go on."""
        return max(self.base * self.decay ** (step / total), self.floor)

    def bytes_needed(self, shape: Shape) -> int:
        errors = 4 * shape.batch  # of the newest check, read at the next step
        return forecast_bytes(shape, self.granularity, self.order + 1, stages=3, text=True) + errors

    def build(self) -> SpeCa:
        return SpeCa(self)


class Draft:
    """How far the present draft of one sample has gone; the authors' scheduler."""

    def __init__(self) -> None:
        self.last_full: bool | None = None
        self.count = 0  # drafts in a row
        self.error: float | None = None  # measured at the step before; None: not measured

    def due(self, step: int, cfg: SpeCaConfig) -> bool:
        """Whether `step`, after a draft, is computed whatever the error was."""
        return step < cfg.warmup_steps or self.count >= cfg.max_drafts

    def decide(self, step: int, total: int, cfg: SpeCaConfig) -> tuple[bool, bool]:
        """Whether `step` is computed, and whether a drafted one is checked."""
        if self.last_full is None:  # nothing to draft from: the beginning, or all has been forgotten
            full, checked = True, False
        elif self.last_full and cfg.max_drafts > 0:  # also within the warm-up
            full, checked = False, False
        else:
            checked = self.count >= cfg.min_drafts
            full = self.due(step, cfg) or (checked and self.failed(step, total, cfg))
        self.last_full = full
        self.count = 0 if full else self.count + 1
        self.error = None
        return full, checked and not full

    def failed(self, step: int, total: int, cfg: SpeCaConfig) -> bool:
        """Whether the error measured before `step` is above its tolerance."""
        return self.error is not None and not self.error <= cfg.tolerance(step, total)


class Drafts:
    """Those of all samples of a batch, and the errors measured last."""

    def __init__(self, batch: int) -> None:
        self.each = [Draft() for _ in range(batch)]
        self.errors: Tensor | None = None  # (B,) or (1,), on the device
        self.checked = [False] * batch  # whose errors count

    def decide(self, memory: Memory, cfg: SpeCaConfig) -> tuple[list[bool], bool]:
        """Which samples are drafted at this step, and whether any of those is checked."""
        step, total = memory.step, memory.total_steps
        if self.errors is not None and not all(draft.due(step, cfg) for draft in self.each):
            errors = memory.read(self.errors) or [math.nan]
            for n, draft in enumerate(self.each):
                draft.error = errors[n % len(errors)] if self.checked[n] else None
        self.errors = None
        decided = [draft.decide(step, total, cfg) for draft in self.each]
        self.checked = [checked for _, checked in decided]
        return [not full for full, _ in decided], any(self.checked)


def error_of(
    draft: Tensor,
    real: Tensor,
    measure: str,
    reduce: str = "sample",
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """The relative errors, float32 numbers on the device: (B,), or (1,) over the batch.

    total: sums over all processes where each has some of the tokens.
    """
    rows = 1 if reduce == "mean" else len(draft)
    draft, real = draft.float().reshape(rows, -1), real.float().reshape(rows, -1)
    difference, size = (draft - real).abs(), real.abs()
    if measure == "norm":
        error, whole = difference.sum(-1), size.sum(-1)
    else:
        error, whole = (difference / (size + 1e-10)).sum(-1), torch.full_like(size[:, 0], size.shape[1])
    error, whole = total(torch.stack([error, whole]))
    return error / whole


class SpeCa(Method):
    """Draft, check, and compute where the check fails."""

    config: SpeCaConfig

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One denoising step of one branch."""
        cfg, step = self.config, memory.step  # the step first: asking may show that a new request began
        drafts = memory.state("drafts", lambda: Drafts(memory.batch))
        drafted, checked = drafts.decide(memory, cfg)
        alone = step < cfg.warmup_steps - 1 and not any(drafted)  # in the warm-up all samples are at one
        drive = self._modules if cfg.granularity == "module" else self._stages
        yield from drive(stages, memory, drafts, drafted, checked, alone)
        memory.record_stack(stages, None, 0.0, all(drafted))

    def _modules(
        self, stages: tuple, memory: Memory, drafts: Drafts, drafted: list[bool], checked: bool, alone: bool
    ) -> Program:
        cfg, end, at = self.config, stages[-1].last, float(memory.step)
        modules = memory.state("modules", lambda: ModuleForecast(cfg.rule, cfg.order + 1, memory.batch))
        skips = all(drafted)
        if alone:
            modules.clear()
        if skips:
            modules.begin_forecast(at)
        else:
            modules.begin_computed(at, kept=drafted)
        answer = modules.predict if skips else modules.learn
        yield Drive(range(end - 1 if checked else end), answer, counts=not skips)
        if not checked:
            return

        def compare(index: int, name: str, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
            guess = modules.predict(index, name, forward, args, kwargs)
            real = forward(*args, **kwargs)
            if name in COMPARED:
                drafts.errors = error_of(guess, real, cfg.measure, cfg.reduce, memory.total)
            return guess if skips else modules.learn(index, name, lambda *_, **__: real, args, kwargs)

        yield Drive(range(end - 1, end), compare, counts=True)

    def _stages(
        self, stages: tuple, memory: Memory, drafts: Drafts, drafted: list[bool], checked: bool, alone: bool
    ) -> Program:
        cfg, end, at = self.config, stages[-1].last, float(memory.step)
        parts = {stage.name: range(stage.first, min(stage.last, end - 1)) for stage in stages}
        new = partial(Forecast, cfg.rule, cfg.order + 1)
        for name, blocks in (parts | {"last block": range(end - 1, end)}).items():
            slot, measured = memory.slot(name, new), checked and name == "last block"
            if not len(blocks):
                continue
            if not any(drafted):
                ran = yield Run(blocks)
                if alone:
                    slot.clear()
                slot.predictor.learn(ran.residual, at=at)
                continue
            guess = slot.predictor.predict(at)
            if all(drafted) and not measured:
                yield Skip(blocks, guess)
                continue
            ran = yield Run(blocks, kept=drafted, stand_in=guess)
            if measured:
                real = ran.residual.joint
                drafts.errors = error_of(guess.joint, real, cfg.measure, cfg.reduce, memory.total)
            if not all(drafted):
                slot.predictor.learn(ran.residual, at=at, kept=drafted)
