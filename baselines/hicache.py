"""HiCache: TaylorSeer with scaled Hermite polynomials in place of powers.

Source: arXiv 2508.16984 (ICLR 2026) and the authors' published settings. The contraction sigma is applied
twice, to the argument and to the coefficient; sigma^2 = 1/2 at order 1 is TaylorSeer. adaptive=True is the
code's "HiCache-Analytic": a sigma for each module, from how far its outputs move.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from h2cache import weights
from h2cache.forecasting import (
    GRANULARITIES,
    Key,
    ModuleForecast,
    StageForecast,
    forecast_bytes,
    forecast_of,
    module_tensors,
)
from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig, Shape, check
from h2cache.policies import interval_due
from h2cache.predictors import combine
from h2cache.program import Program, Stage


@dataclass(frozen=True)
class HiCacheConfig(MethodConfig):
    """Settings of HiCache; `PRESETS` has the authors' by name."""

    name = "hicache"
    instead = ': use granularity="stage"'

    interval: int = 6
    """A step is computed every so many steps, >= 1. Higher: faster, less faithful. 1: always compute."""
    order: int = 2
    """Order of the polynomial, 0 (plain reuse) to 4; above 3 it amplifies noise in bfloat16."""
    sigma: float = 0.5
    """Contraction in (0, 1]. Lower: closer to plain reuse."""
    warmup_steps: int = 3
    """First steps that are always computed, >= 1."""
    basis: str = "hermite"
    """"hermite", or "taylor": only the dual scaling, the paper's ablation."""
    adaptive: bool = False
    """In place of `sigma`: min(1, alpha / (sqrt(2) q + eps)), for each module and each image of a batch; q is
    a running mean square of the mean token norm of the module's first difference."""
    alpha: float = 1.28
    """Of `adaptive`, > 0. Lower: closer to plain reuse."""
    granularity: str = "module"
    """"module" as the authors, or "stage" [ours], see `taylorseer.py`."""

    def __post_init__(self) -> None:
        check("interval", self.interval, 1, float("inf"), "it is a number of steps; 1 switches off")
        check("order", self.order, 0, 4, "higher differences are noise")
        check("warmup_steps", self.warmup_steps, 1, float("inf"), "the first step must be computed")
        if not 0 < self.sigma <= 1:
            raise ValueError(f"sigma={self.sigma!r} is out of range (0, 1]: it contracts")
        if self.basis not in ("hermite", "taylor"):
            raise ValueError(f"basis={self.basis!r} is unknown: choose 'hermite' or 'taylor'")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity={self.granularity!r} is unknown: choose 'module' or 'stage'")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha!r} is out of range (0, inf): it is a scale")
        if self.adaptive and (self.granularity, self.basis) != ("module", "hermite"):
            raise ValueError(
                f"adaptive=True is for modules and Hermite polynomials, not for granularity="
                f"{self.granularity!r} with basis={self.basis!r}: leave both at their defaults"
            )
        if self.order > 3:
            warnings.warn(f"order={self.order} amplifies noise in bfloat16 differences", stacklevel=3)

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"modules"} if self.granularity == "module" else ())

    @property
    def undivided(self) -> str:
        return "hicache with adaptive=True measures all tokens" if self.adaptive else ""

    def bytes_needed(self, shape: Shape) -> int:
        held = forecast_bytes(shape, self.granularity, self.order + 1)
        return held + self.adaptive * shape.batch * module_tensors(shape) * 4  # mean squares

    def build(self) -> HiCache:
        return HiCache(self)


PRESETS = {
    "paper, FLUX.1-dev": HiCacheConfig(interval=7, order=2, sigma=0.5),  # 5.55x at 50 steps
    "authors' demonstration": HiCacheConfig(interval=5, order=2, sigma=0.6),
    "authors' launcher": HiCacheConfig(interval=5, order=2, sigma=0.7),
    "authors' core": HiCacheConfig(interval=6, order=1, sigma=0.5),
}


RATE, EPS = 0.01, 1e-6  # of the running mean, and against a division by 0


class AdaptiveForecast(ModuleForecast):
    """Hermite polynomials whose sigma is each module's own; nothing waits for it."""

    def __init__(self, cfg: HiCacheConfig) -> None:
        super().__init__(weights.last, cfg.order + 1)
        self.order, self.alpha = cfg.order, cfg.alpha
        self.squares: dict[Key, list[Tensor]] = {}  # q of each of a module's outputs, (B,)

    def learn(self, index: int, name: str, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a module and keep what it gives, and how far that has moved."""
        out = super().learn(index, name, forward, args, kwargs)
        *_, new = stored = self.outputs[index, name]
        q = self.squares.get((index, name)) or [part.new_ones(len(part), dtype=torch.float32) for part in new]
        if len(stored) > 1:
            gap = self.times[0][-1] - self.times[0][-2]
            steps = [(a.float() - b.float()) / gap for a, b in zip(new, stored[-2], strict=True)]
            norms = [step.norm(dim=-1).mean(-1) for step in steps]  # (B,)
            q = [torch.lerp(old, norm**2, RATE) for old, norm in zip(q, norms, strict=True)]
        self.squares[index, name] = q
        return out

    def begin_forecast(self, at: float) -> None:
        """A forecast step begins."""
        (times,) = self.times
        self._rows, self._k = weights.differences(times, self.order), at - times[-1]

    def predict(self, index: int, name: str, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the module would give, without running it."""
        parts = []
        for n, q in enumerate(self.squares[index, name]):
            sigma = (self.alpha / (math.sqrt(2) * q + EPS)).clamp(max=1.0)[:, None, None]  # (B, 1, 1)
            terms = [
                sigma**i * weights.hermite_polynomial(i, sigma * self._k) / math.factorial(i)
                for i in range(len(self._rows))
            ]
            columns = zip(*self._rows, strict=True)  # the weight of each stored output in each difference
            factors = [sum(t * c for t, c in zip(terms, column, strict=True)) for column in columns]
            parts += combine([[out[n]] for out in self.outputs[index, name]], factors)
        return parts[0] if len(parts) == 1 else tuple(parts)


class HiCache(Method):
    """Steps are computed on a schedule and forecast in between."""

    config: HiCacheConfig

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One denoising step of one branch."""
        cfg, step = self.config, memory.step
        basis = weights.hermite if cfg.basis == "hermite" else weights.taylor_scaled
        rule = partial(basis, order=cfg.order, sigma=cfg.sigma)  # sum_i D_i sigma^i H_i(sigma k) / i!
        if cfg.adaptive:
            history: ModuleForecast | StageForecast = memory.state("forecast", lambda: AdaptiveForecast(cfg))
        else:
            history = forecast_of(memory, cfg.granularity, rule, cfg.order)
        full = history.empty or interval_due(step, cfg.interval, cfg.warmup_steps)
        if full:
            if step < cfg.warmup_steps - 1:
                history.clear()  # differences count from the last warm-up step on
            yield from history.compute(stages, at=step)
        else:
            yield from history.forecast(stages, at=step)
        memory.record_stack(stages, None, 0.0, not full)
