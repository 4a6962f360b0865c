"""Fewer steps: the control that every cache must beat, its compute spent on fewer uncached steps.

No source: this is what a user without a cache does. The number of blocks executed is the same as that of a
cache with as many times fewer blocks; the picture comes from a coarser time grid.
"""

from __future__ import annotations

from dataclasses import dataclass

from h2cache.baselines.none import Uncached

from h2cache.method import MethodConfig, check


@dataclass(frozen=True)
class FewerStepsConfig(MethodConfig):
    """Settings of the control."""

    name = "fewer_steps"
    reuses = False

    factor: float = 5.0
    """How many times fewer steps, >= 1. Higher: faster, coarser. 1: as many as asked for."""

    def __post_init__(self) -> None:
        check("factor", self.factor, 1.0, float("inf"), "it divides the number of steps")

    def requested_steps(self, steps: int) -> int:
        return max(1, round(steps / self.factor))

    def build(self) -> Uncached:
        return Uncached(self)
