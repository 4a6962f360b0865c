"""No cache: every block of every step runs. The baseline that all others are measured against."""

from __future__ import annotations

from dataclasses import dataclass

from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig
from h2cache.program import Program, Run, Stage


@dataclass(frozen=True)
class NoneConfig(MethodConfig):
    """There is nothing to set."""

    name = "none"
    reuses = False

    def build(self) -> Uncached:
        return Uncached(self)


class Uncached(Method):
    """Runs everything and keeps nothing; it only counts blocks."""

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        yield Run(range(stages[-1].last))  # at once, which some engines can do in one call
        memory.record_uncached(stages)
