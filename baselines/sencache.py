"""SenCache: the model's sensitivity to its two inputs, from a table, bounds the error of reuse.

Source: arXiv 2602.24208 (CVPR 2026) and the authors' code for Wan 2.1, CogVideoX and LTX-Video. Jx |dx| +
Jt |dt| since the last computed step is compared with a threshold, tighter at first; Jx and Jt are looked up
at the last computed step. No sum, no block: both guidance branches see the same latents, so the one decides
as the other, as in the authors' code. The table is measured once on a checkpoint
(`constants/sencache.json`, `analysis/fit_sencache.py`). Deviations: sizes are root mean squares, so that a
table serves every resolution (the authors multiply the threshold by the root of the number of latents);
per-sample decisions; Jt is that for the time in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig, Shape, check
from h2cache.policies import below
from h2cache.predictors import LastResidual
from h2cache.program import Latents, Program, Run, Skip, Stage, Stream
from h2cache.registry import fitted_constants
from h2cache.schedule import TRAINED
from h2cache.similarity import sample_mask


@dataclass(frozen=True)
class SenCacheConfig(MethodConfig):
    """Settings of SenCache: the defaults of the authors' code for Wan 2.1 at 50 steps."""

    name = "sencache"

    threshold: float = 0.07
    """Limit of the expected change of the output, root mean square, >= 0. Higher: faster. 0: always compute.
    The authors' page on Wan 2.1 1.3B takes 2 with early_threshold 0.045 and 3 hits in a row."""
    early_threshold: float = 0.005
    """The same at first, where it is the lower one."""
    early: float = 0.2
    """Share of the steps at the beginning for which that holds, in [0, 1]."""
    max_consecutive_hits: int = 10
    """Steps skipped in a row at most (K), >= 0."""
    times: tuple[float, ...] = ()
    """Times of the table, in [0, 1]; empty: the table of the checkpoint."""
    by_latents: tuple[float, ...] = ()
    """Jx at each: change of the output for a change of the latents."""
    by_time: tuple[float, ...] = ()
    """Jt at each: change of the output, root mean square, for a change of the time."""
    checkpoint: str = ""
    """Whose table to take; empty: the name of the folder or hub id that the model came from."""

    def __post_init__(self) -> None:
        check("threshold", self.threshold, 0.0, float("inf"), "it is a change of the output; 0 switches off")
        check("early_threshold", self.early_threshold, 0.0, float("inf"), "it is a change of the output")
        check("early", self.early, 0.0, 1.0, "it is a share of the steps")
        check("max_consecutive_hits", self.max_consecutive_hits, 0, float("inf"), "it counts steps")
        if not len(self.times) == len(self.by_latents) == len(self.by_time):
            raise ValueError(
                f"times, by_latents and by_time have {len(self.times)}, {len(self.by_latents)} and "
                f"{len(self.by_time)} values: they are one table, so as many of each are needed"
            )

    @property
    def needs_total_steps(self) -> bool:
        return True

    def for_checkpoint(self, checkpoint: str | None) -> SenCacheConfig:
        if self.times:
            return self
        table = fitted_constants("sencache", self.checkpoint or checkpoint)
        times, by_latents, by_time = (tuple(table[key]) for key in ("times", "by_latents", "by_time"))
        return replace(self, times=times, by_latents=by_latents, by_time=by_time)

    def bytes_needed(self, shape: Shape) -> int:
        return shape.tensor(shape.img) + shape.denoised

    def build(self) -> SenCache:
        return SenCache(self)


@dataclass
class Computed:
    """Of each sample's last computed step."""

    latents: Tensor
    times: list[float]


class SenCache(Method):
    """Nothing of the stack runs on a hit."""

    config: SenCacheConfig

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One denoising step of one branch."""
        cfg, step, blocks = self.config, memory.step, range(stages[-1].last)
        latents = yield Latents()
        unit = memory.state("unit", lambda: [TRAINED if memory.timestep > 1 else 1.0])[0]
        slot, time = memory.slot("stack", LastResidual), memory.timestep / unit
        last = memory.state("last", lambda: Computed(latents, [time] * memory.batch))
        hit, errors = [False] * memory.batch, None
        if slot.predictor.residual is not None:
            moved = memory.read(root_mean_square(latents - last.latents))  # None: another request has begun
            if moved is None:
                last = memory.state("last", lambda: Computed(latents, [time] * memory.batch))
            else:
                errors = [self.expected(t, m, abs(time - t)) for t, m in zip(last.times, moved, strict=True)]
                early = step < round(cfg.early * memory.total_steps)
                limit = min(cfg.threshold, cfg.early_threshold) if early else cfg.threshold
                near = below(errors, [limit] * memory.batch)
                most = cfg.max_consecutive_hits
                hit = [n and row < most for n, row in zip(near, slot.hits_in_a_row, strict=True)]
        if all(hit):
            yield Skip(blocks, slot.predictor.predict())
        else:
            stand_in = slot.predictor.predict() if any(hit) else None
            ran = yield Run(blocks, kept=hit, stand_in=stand_in)
            slot.predictor.learn(Stream(ran.residual.img), kept=hit)
            last.latents = (
                torch.where(sample_mask(hit, latents), last.latents, latents) if any(hit) else latents
            )
            last.times = [t if h else time for t, h in zip(last.times, hit, strict=True)]
        slot.count_hits(hit)
        memory.record_stack(stages, errors, cfg.threshold, all(hit))

    def expected(self, then: float, moved: float, passed: float) -> float:
        """Jx |dx| + Jt |dt|, with the sensitivities at the time `then`."""
        cfg = self.config
        near = min(range(len(cfg.times)), key=lambda n: abs(cfg.times[n] - then))
        return cfg.by_latents[near] * moved + cfg.by_time[near] * passed


def root_mean_square(values: Tensor) -> Tensor:
    """Of each sample, (B,) float32."""
    return values.float().flatten(1).square().mean(1).sqrt()
