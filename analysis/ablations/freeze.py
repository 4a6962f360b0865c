"""Freezing one stage for a while: not a method to use, but what tells what a stage is for.

While frozen, a stage is what a hit of H2-Cache would make of it: its head block runs, the rest is replaced
by the residual of the last step before. The other stage is computed as ever.
"""

from __future__ import annotations

from dataclasses import dataclass

from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig, check
from h2cache.predictors import LastResidual
from h2cache.program import Program, Run, Skip, Stage

STAGES = ("structure", "detail", "both")


@dataclass(frozen=True)
class FreezeConfig(MethodConfig):
    """Which stage stands still, and when."""

    name = "freeze"

    stage: str = "structure"
    """"structure", "detail" or "both"."""
    first: int = 1
    """First frozen step, at least 1: step 0 has nothing before it."""
    last: int = 11
    """First step that is computed again; at or beyond the end of the run: frozen to the end."""

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage={self.stage!r} is unknown: choose one of {', '.join(STAGES)}")
        check("first", self.first, 1, float("inf"), "step 0 has nothing before it")
        check("last", self.last, self.first, float("inf"), "it comes after the first frozen step")

    def build(self) -> Freeze:
        return Freeze(self)


class Freeze(Method):
    """Computes all but the frozen stage in the frozen steps."""

    config: FreezeConfig

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One denoising step of one branch."""
        cfg = self.config
        frozen_now = cfg.first <= memory.step < cfg.last
        for stage in stages:
            slot = memory.slot(stage.name, LastResidual)
            frozen = frozen_now and cfg.stage in (stage.name, "both")
            yield Run(stage.head)
            if frozen:
                yield Skip(stage.rest, slot.predictor.predict())
            else:
                rest = yield Run(stage.rest)
                slot.predictor.learn(rest.residual, kept=[False] * memory.batch)
            memory.record(stage, None, None, "forced" if frozen else "miss")
