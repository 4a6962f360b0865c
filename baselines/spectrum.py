"""Spectrum: Chebyshev polynomials over the whole run, fitted to all computed steps, forecast what is skipped.

Source: arXiv 2603.01623 (CVPR 2026) and the authors' code for FLUX.1-dev, SD3.5, SDXL, HunyuanVideo and
Wan. Ridge regression gives the coefficients of T_0 to T_M on [0, N]; `mix` of its forecast and 1 - mix of a
line through the last two computed steps stand in. After the warm-up every `window`-th step is computed, and
each computed step makes the window longer by `growth`. Deviations: what the blocks add is forecast, not the
features behind the last block, so that the embedded latents stay fresh; N is the number of steps (theirs is
50 for any number); sums are kept in place of all features, in float32 (theirs is bfloat16). Text is not
cached.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig, Shape, check
from h2cache.program import Program, Run, Skip, Stage, Stream
from h2cache.similarity import settled


@dataclass(frozen=True)
class SpectrumConfig(MethodConfig):
    """Settings of Spectrum: the authors' for FLUX.1-dev at 50 steps, 14 of them computed (growth 3: 10)."""

    name = "spectrum"

    window: float = 2.0
    """A step is computed every so many steps behind the warm-up, rounded down, >= 1."""
    growth: float = 0.75
    """What each computed step adds to the window, >= 0. Higher: faster. 0 with window 1: always compute."""
    warmup_steps: int = 5
    """First steps that are always computed, >= 1."""
    mix: float = 0.5
    """Share of the polynomial in the forecast, in [0, 1]; 1 as in the paper, 0.5 to 1 recommended since."""
    order: int = 4
    """Highest Chebyshev polynomial (M), >= 1."""
    ridge: float = 0.1
    """Weight of the coefficients' squares in the fit (lambda), > 0."""

    def __post_init__(self) -> None:
        check(
            "window", self.window, 1.0, float("inf"), "it is a number of steps; 1 with growth 0 switches off"
        )
        check("growth", self.growth, 0.0, float("inf"), "the window grows by it")
        check("warmup_steps", self.warmup_steps, 1, float("inf"), "the first step must be computed")
        check("mix", self.mix, 0.0, 1.0, "it is a share")
        check("order", self.order, 1, 20, "higher polynomials are noise")
        check("ridge", self.ridge, 1e-9, float("inf"), "the fit has more unknowns than steps at first")

    @property
    def needs_total_steps(self) -> bool:
        return True

    def schedule(self, total: int) -> list[bool]:
        """Which of `total` steps are computed: a pure function of the settings."""
        window, skipped, computed = self.window, 0, []
        for step in range(total):
            full = step < self.warmup_steps
            if not full and (full := window < math.inf and (skipped + 1) % math.floor(window) == 0):
                window = round(window + self.growth, 3)
            skipped = 0 if full else skipped + 1
            computed.append(full)
        return computed

    def bytes_needed(self, shape: Shape) -> int:
        tokens = shape.tensor(shape.img)
        return (self.order + 1) * tokens * 4 // shape.itemsize + 2 * tokens

    def build(self) -> Spectrum:
        return Spectrum(self)


class Fit:
    """The running sums of a ridge regression on Chebyshev polynomials, and the last two values."""

    def __init__(self, order: int, ridge: float, total: int) -> None:
        self.order, self.total = order, total
        self.sums: Tensor | None = None  # X' H, (order + 1, B, I, C) float32
        self.gram = ridge * np.eye(order + 1)  # X' X + lambda I
        self.times: list[float] = []
        self.values: list[Tensor] = []  # the last two

    def basis(self, at: float) -> np.ndarray:
        """T_0 to T_M at this step, on [0, total]."""
        place = 2 * at / self.total - 1
        return np.polynomial.chebyshev.chebvander(np.array(place), self.order).reshape(-1)

    def learn(self, value: Tensor, at: float) -> None:
        value, row = settled(value), self.basis(at)
        self.gram = self.gram + np.outer(row, row)
        if self.sums is None:
            self.sums = value.new_zeros((len(row), *value.shape), dtype=torch.float32)
        for total, factor in zip(self.sums, row.tolist(), strict=True):
            total.add_(value.float(), alpha=factor)
        self.values, self.times = [*self.values, value][-2:], [*self.times, at][-2:]

    def predict(self, at: float, mix: float) -> Tensor:
        newest = self.values[-1].float()
        line = newest
        if len(self.times) > 1:
            steps = (at - self.times[1]) / (self.times[1] - self.times[0])
            line = newest + steps * (newest - self.values[0].float())
        if not mix or self.sums is None:
            return line.to(self.values[-1].dtype)
        weights: Any = np.linalg.solve(self.gram, self.basis(at))
        curve = torch.tensordot(torch.tensor(weights, dtype=torch.float32, device=line.device), self.sums, 1)
        return ((1 - mix) * line + mix * curve).to(self.values[-1].dtype)


@dataclass(frozen=True)
class Plan:
    """Which steps are computed: worked out once a request."""

    computed: list[bool]


class Spectrum(Method):
    """A schedule, and one forecast of all blocks."""

    config: SpectrumConfig

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One denoising step of one branch."""
        cfg, step, total = self.config, memory.step, memory.total_steps
        fit = memory.state("fit", lambda: Fit(cfg.order, cfg.ridge, total))
        computed = memory.state("plan", lambda: Plan(cfg.schedule(total))).computed
        blocks = range(stages[-1].last)
        full = not fit.values or step >= len(computed) or computed[step]
        if full:
            ran = yield Run(blocks)
            fit.learn(ran.residual.img, float(step))
        else:
            yield Skip(blocks, Stream(fit.predict(float(step), cfg.mix)))
        memory.record_stack(stages, None, 0.0, not full)
