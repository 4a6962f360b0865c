"""MagCache: how much the network's residual shrinks from step to step is nearly the same for every prompt.

Source: arXiv 2506.09045 (NeurIPS 2025) and the authors' repository. Their product over skipped steps says how
far the stored residual has drifted, so the whole schedule follows from a table measured once on a checkpoint
(`constants/magcache.json`, `analysis/fit_magcache.py`); no feature is compared. Text is not cached.
With a table for each of two branches, calls are counted, not steps, as by the authors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig, Shape, check
from h2cache.predictors import LastResidual
from h2cache.program import Program, Run, Skip, Stage, Stream
from h2cache.registry import fitted_constants

USUAL = {"threshold": 0.24, "max_consecutive_hits": 5, "retention": 0.1}


@dataclass(frozen=True)
class MagCacheConfig(MethodConfig):
    """Settings of MagCache. None: the authors' for the checkpoint, else for FLUX.1-dev (28 steps, 2.8x)."""

    name = "magcache"

    threshold: float | None = None
    """Limit of the summed drift of a stretch of skipped steps, >= 0. Higher: faster. 0: always compute."""
    max_consecutive_hits: int | None = None
    """Steps skipped in a row at most (K), >= 0. 0: always compute."""
    retention: float | None = None
    """Share of the calls at the beginning that is always computed, in [0, 1]. A step is two calls where the
    table has two branches: of an odd number of calls the branch with the prompt has one more."""
    round_retention: bool = True
    """Round that to whole steps, as the authors for FLUX; False: cut it, as for Qwen, Hunyuan and Wan."""
    ratios: tuple[float, ...] = ()
    """Size of each step's residual, of that of the step before; empty: those of the checkpoint."""
    ratios_uncond: tuple[float, ...] = ()
    """The same of the branch without the prompt, where it differs."""
    always_compute: tuple[float, ...] = ()
    """Steps that are always computed, counted in the steps of `ratios`: an outlier in FLUX.1's table."""
    checkpoint: str = ""
    """Whose ratios to take; empty: the name of the folder or hub id that the model came from."""

    def __post_init__(self) -> None:
        for field, highest, why in (
            ("threshold", float("inf"), "it is a summed drift; 0 switches off"),
            ("max_consecutive_hits", float("inf"), "it counts steps"),
            ("retention", 1.0, "it is a share of the steps"),
        ):
            if getattr(self, field) is not None:
                check(field, getattr(self, field), 0, highest, why)
        if len(self.ratios) == 1:
            raise ValueError("ratios: one value is no table; two steps at least are needed")

    @property
    def needs_total_steps(self) -> bool:
        return True

    def for_checkpoint(self, checkpoint: str | None) -> MagCacheConfig:
        if self.ratios:
            return self._settled({})
        table = fitted_constants("magcache", self.checkpoint or checkpoint)
        return replace(
            self._settled(table.get("authors_setting", {})),
            ratios=tuple(table["ratios"]),
            ratios_uncond=tuple(table.get("ratios_uncond", ())),
            always_compute=tuple(table.get("always_compute", ())),
            round_retention=self.round_retention and table.get("round_retention", True),
        )

    def _settled(self, authors: dict[str, float]) -> MagCacheConfig:
        """With the authors' values, else those of FLUX.1-dev, for what is left open."""
        usual: dict[str, Any] = USUAL | authors
        return replace(self, **{key: usual[key] for key in USUAL if getattr(self, key) is None})

    def schedule(self, total: int, uncond: bool = False) -> list[bool]:
        """Which of `total` steps are computed: a pure function of the table and the settings."""
        threshold, most, retention = self.threshold, self.max_consecutive_hits, self.retention
        if threshold is None or most is None or retention is None:
            return self._settled({}).schedule(total, uncond)
        ratios = resample(self.ratios_uncond if uncond and self.ratios_uncond else self.ratios, total)
        last = len(self.ratios) - 1
        branches = 2 if self.ratios_uncond else 1
        calls = int(branches * total * retention + (0.5 if self.round_retention else 0.0))
        retained = max(1, (calls + branches - 1 - (uncond and branches == 2)) // branches)
        product, skipped, error, computed = 1.0, 0, 0.0, []
        for step, ratio in enumerate(ratios):
            forced = step < retained or round(step * (last / max(total - 1, 1))) in self.always_compute
            if step >= retained:
                product, skipped = product * ratio, skipped + 1
                error += abs(1.0 - product)
                within = error <= threshold and skipped <= most
                forced = forced or not within or threshold == 0
            if forced:
                product, skipped, error = 1.0, 0, 0.0
            computed.append(forced)
        return computed

    def bytes_needed(self, shape: Shape) -> int:
        return shape.tensor(shape.img)

    def build(self) -> MagCache:
        return MagCache(self)


def resample(ratios: tuple[float, ...], total: int) -> list[float]:
    """The nearest entries of the table for another number of steps; first and last stay.

    The factor is rounded before it is multiplied, as by the authors: ties at 71, 75 or 99 steps depend on it.
    """
    if total == 1:
        return [ratios[0]]
    factor = (len(ratios) - 1) / (total - 1)
    return [ratios[round(i * factor)] for i in range(total)]


@dataclass(frozen=True)
class Schedule:
    """Which steps of a request and branch are computed: worked out once."""

    computed: list[bool]


class MagCache(Method):
    """The stored residual of the whole network stands in, unscaled."""

    config: MagCacheConfig

    def _schedule(self, memory: Memory) -> Schedule:
        return Schedule(self.config.schedule(memory.total_steps, memory.branch == "uncond"))

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One denoising step of one branch."""
        step = memory.step  # first of all: asking may show that a new request began
        slot, blocks = memory.slot("stack", LastResidual), range(stages[-1].last)
        computed = memory.state("schedule", lambda: self._schedule(memory)).computed
        full = slot.predictor.residual is None or step >= len(computed) or computed[step]
        if full:
            ran = yield Run(blocks)
            slot.predictor.learn(Stream(ran.residual.img))
        else:
            yield Skip(blocks, slot.predictor.predict())
        memory.record_stack(stages, None, 0.0, not full)
