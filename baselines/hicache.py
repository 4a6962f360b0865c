"""HiCache: TaylorSeer with scaled Hermite polynomials in place of powers.

Source: arXiv 2508.16984 (ICLR 2026) and the authors' published settings. The contraction sigma is applied
twice, to the argument and to the coefficient; sigma^2 = 1/2 at order 1 is TaylorSeer.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial

from h2cache import weights
from h2cache.forecasting import GRANULARITIES, forecast_bytes, forecast_of
from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig, Shape, check
from h2cache.policies import interval_due
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
        if self.order > 3:
            warnings.warn(f"order={self.order} amplifies noise in bfloat16 differences", stacklevel=3)

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"modules"} if self.granularity == "module" else ())

    def bytes_needed(self, shape: Shape) -> int:
        return forecast_bytes(shape, self.granularity, self.order + 1)

    def build(self) -> HiCache:
        return HiCache(self)


PRESETS = {
    "paper, FLUX.1-dev": HiCacheConfig(interval=7, order=2, sigma=0.5),  # 5.55x at 50 steps
    "authors' demonstration": HiCacheConfig(interval=5, order=2, sigma=0.6),
    "authors' launcher": HiCacheConfig(interval=5, order=2, sigma=0.7),
    "authors' core": HiCacheConfig(interval=6, order=1, sigma=0.5),
}


class HiCache(Method):
    """Steps are computed on a schedule and forecast in between."""

    config: HiCacheConfig

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One denoising step of one branch."""
        cfg, step = self.config, memory.step
        basis = weights.hermite if cfg.basis == "hermite" else weights.taylor_scaled
        rule = partial(basis, order=cfg.order, sigma=cfg.sigma)  # sum_i D_i sigma^i H_i(sigma k) / i!
        history = forecast_of(memory, cfg.granularity, rule, cfg.order)
        full = history.empty or interval_due(step, cfg.interval, cfg.warmup_steps)
        if full:
            if step < cfg.warmup_steps - 1:
                history.clear()  # differences count from the last warm-up step on
            yield from history.compute(stages, at=step)
        else:
            yield from history.forecast(stages, at=step)
        memory.record_stack(stages, None, 0.0, not full)
