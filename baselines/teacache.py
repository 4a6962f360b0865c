"""TeaCache: the change of the first block's modulated input, rescaled and summed over steps, decides.

Source: arXiv 2411.19108 (CVPR 2025) and the authors' repository. The polynomial maps the change of the input
to the expected change of the output; it is fitted to a checkpoint (`constants/teacache.json`,
`analysis/fit_teacache.py`). Text is not cached. Deviations: per-sample decisions, float32 means, non-finite
values compute, the number of steps is the request's own. Of models with a reference image only the drawn
tokens are looked at, for which the authors' polynomial of Kontext was not fitted: their changes are larger.
Wan's input is the projected timestep embedding. The authors' coefficients for it belong to their mode
"use_ret_steps", which computes the first five steps and does not force the last: give them together with
warmup_steps=5, last_steps=0. Their other set is for another input, which is not offered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig, Shape, check
from h2cache.predictors import LastResidual
from h2cache.program import Look, Program, Run, Skip, Stage, Stream
from h2cache.registry import fitted_constants


@dataclass(frozen=True)
class TeaCacheConfig(MethodConfig):
    """Settings of TeaCache. The authors' threshold for 1.5x on FLUX.1-dev at 28 steps is the default."""

    name = "teacache"
    requires = frozenset({"modulated input"})

    threshold: float = 0.25
    """Limit of the summed rescaled change, >= 0. Higher: faster, less faithful. 0: always compute."""
    coefficients: tuple[float, ...] = ()
    """Polynomial of degree 4, highest power first; empty: that of the checkpoint."""
    fitted_range: tuple[float, ...] = ()
    """Lowest and highest change that the fit has seen; changes are clamped to it. Empty: not clamped."""
    checkpoint: str = ""
    """Whose coefficients to take; empty: the name of the folder or hub id that the model came from."""
    warmup_steps: int = 1
    """First steps that are always computed, >= 1."""
    last_steps: int = 1
    """Last steps that are always computed, >= 0."""
    clamp: bool = False
    """Take a negative value of the polynomial for 0; the authors let the sum fall."""
    max_consecutive_hits: int | None = None
    """Compute after this many hits in a row, >= 1; None: no limit, as the authors."""

    def __post_init__(self) -> None:
        check("threshold", self.threshold, 0.0, float("inf"), "it is a summed change; 0 switches off")
        if len(self.coefficients) not in (0, 5):
            raise ValueError(f"coefficients={self.coefficients}: five are needed, highest power first")
        if len(self.fitted_range) not in (0, 2):
            raise ValueError(f"fitted_range={self.fitted_range}: a lowest and a highest change are needed")
        check("warmup_steps", self.warmup_steps, 1, float("inf"), "the first step must be computed")
        check("last_steps", self.last_steps, 0, float("inf"), "it is a number of steps")
        if self.max_consecutive_hits is not None:
            check("max_consecutive_hits", self.max_consecutive_hits, 1, float("inf"), "use None for no limit")

    @property
    def needs_total_steps(self) -> bool:
        return self.last_steps > 0

    def for_checkpoint(self, checkpoint: str | None) -> TeaCacheConfig:
        if self.coefficients:
            return self
        constants = fitted_constants("teacache", self.checkpoint or checkpoint)
        coefficients, fitted_range = (tuple(constants.get(k, ())) for k in ("coefficients", "fitted_range"))
        return replace(self, coefficients=coefficients, fitted_range=fitted_range)

    def bytes_needed(self, shape: Shape) -> int:
        modulated = shape.compared[0] if shape.modulated is None else shape.modulated
        return shape.tensor(shape.img) + shape.tensor(modulated)  # residual, and modulated input

    def build(self) -> TeaCache:
        return TeaCache(self)


class TeaCache(Method):
    """Nothing of the stack runs on a hit, not even the first block."""

    config: TeaCacheConfig

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One denoising step of one branch (the numbers are those of the specification)."""
        slot = memory.slot("stack", LastResidual)
        sums = memory.state("sums", lambda: [0.0] * memory.batch)  # of rescaled changes, per sample
        modulated = yield Look()  # 1: block 0 itself does not run
        change = slot.compare(modulated)  # 2: against the previous step
        hit = [False] * memory.batch
        forced = memory.in_warmup(self.config.warmup_steps) or memory.in_last(self.config.last_steps)
        if change is not None and not forced:
            sums[:] = [s + self.rescaled(c) for s, c in zip(sums, change, strict=True)]
            hit = [self._below(s, n) for s, n in zip(sums, slot.hits_in_a_row, strict=True)]
        compared = None if change is None else list(sums)
        sums[:] = [s if h else 0.0 for s, h in zip(sums, hit, strict=True)]
        slot.refer(modulated)  # 3: moves on hits too
        blocks = range(stages[-1].last)
        if all(hit):
            yield Skip(blocks, slot.predictor.predict())  # 4
        else:
            stand_in = slot.predictor.predict() if any(hit) else None
            ran = yield Run(blocks, kept=hit, stand_in=stand_in)
            # From the embedded input to the end of the last block, which no text leaves.
            slot.predictor.learn(Stream(ran.residual.img), kept=hit)
        slot.count_hits(hit)
        memory.record_stack(stages, compared, self.config.threshold, all(hit))

    def rescaled(self, change: float) -> float:
        """The expected change of the output for a `change` of the modulated input."""
        if self.config.fitted_range and math.isfinite(change):
            low, high = self.config.fitted_range
            change = min(max(change, low), high)
        value = 0.0
        for coefficient in self.config.coefficients:
            value = value * change + coefficient
        return max(value, 0.0) if self.config.clamp else value

    def _below(self, total: float, hits: int) -> bool:
        """Whether a sample may be skipped; at threshold 0 never, though a sum may be negative."""
        limit, most = self.config.threshold, self.config.max_consecutive_hits
        return limit > 0 and math.isfinite(total) and total < limit and (most is None or hits < most)
