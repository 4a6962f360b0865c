"""Block Cache (first-block cache): the first block's change decides for all the others.

Source: ParaAttention's first-block cache, the same scheme as nunchaku's `fbcache` and diffusers'
`FirstBlockCacheConfig`; "Block Cache" in the tables of H2-Cache (arXiv 2510.27171). One threshold, no
pooling. Deviations: per-sample decisions, float32 means, a non-finite measure computes (diffusers would
reuse).
"""

from __future__ import annotations

from dataclasses import dataclass

from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig, Shape, check
from h2cache.policies import below
from h2cache.predictors import LastResidual
from h2cache.program import Program, Run, Skip, Stage


@dataclass(frozen=True)
class BlockCacheConfig(MethodConfig):
    """Settings of Block Cache. ParaAttention's threshold for FLUX.1-dev at 28 steps is the default."""

    name = "block_cache"

    threshold: float = 0.08
    """Relative change of the first block's residual, >= 0. Higher: faster, less faithful. 0: compute all."""
    warmup_steps: int = 0
    """First steps that are always computed, in steps."""

    def __post_init__(self) -> None:
        check("threshold", self.threshold, 0.0, float("inf"), "it is a relative change; 0 switches off")
        check("warmup_steps", self.warmup_steps, 0, float("inf"), "it is a number of steps")

    def bytes_needed(self, shape: Shape) -> int:
        return shape.joint + shape.tensor(shape.img)  # the residual, and the first block's to compare with

    def build(self) -> BlockCache:
        return BlockCache(self)


class BlockCache(Method):
    """One head block and one check for the whole network."""

    config: BlockCacheConfig

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One denoising step of one branch."""
        slot = memory.slot("stack", LastResidual)
        head = yield Run(range(1))  # the first block always runs
        residual = stages[0].measured(head)  # image tokens only, (B, I, C)
        change = slot.compare(residual)  # against the last computed step
        hit, rest = [False] * memory.batch, range(1, stages[-1].last)
        if change is not None and not memory.in_warmup(self.config.warmup_steps):
            hit = below(change, [self.config.threshold] * memory.batch)
        if all(hit):
            yield Skip(rest, slot.predictor.predict())
        else:
            stand_in = slot.predictor.predict() if any(hit) else None
            ran = yield Run(rest, kept=hit, stand_in=stand_in)
            slot.predictor.learn(ran.residual, kept=hit)  # from after the first block to the end of the last
            slot.refer(residual, kept=hit)
        memory.record_stack(stages, change, self.config.threshold, all(hit))
