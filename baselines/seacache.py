"""SeaCache: the summed change of the latents decides, seen through a filter that follows the noise level.

Source: arXiv 2602.18993 (CVPR 2026) and its implementation in diffusers 0.42 (`hooks/sea_cache.py`); the
authors' repository holds no code. TeaCache's rule without a fitted polynomial: each frequency f of the
latents is weighted as a Wiener filter would at noise level s, (1 - s) P / ((1 - s)^2 P + s^2) with P = 1 /
f^3, axis by axis, and the weights have a mean of 1. The residual of all blocks is reused, or continued by a
line. Text is not cached. Deviations: per-sample decisions; images too, whose tokens are laid out by
`aspect`; of samplers that are no flow, s is that of the flow with the same ratio of signal to noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from h2cache import weights
from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig, Shape, check
from h2cache.predictors import Forecast
from h2cache.program import Latents, Program, Run, Skip, Stage, Stream
from h2cache.schedule import TRAINED

ENDS, LEAST = 1e-6, 1e-16  # of the noise level, and of what is divided by


@dataclass(frozen=True)
class SeaCacheConfig(MethodConfig):
    """Settings of SeaCache: the defaults are those of diffusers."""

    name = "seacache"

    threshold: float = 0.25
    """Limit of the summed change of the filtered latents, >= 0. Higher: faster. 0: always compute."""
    order: int = 1
    """0: the last residual stands in; 1: the line through the last two, over the steps."""
    warmup_steps: int = 1
    """First steps that are always computed, >= 1."""
    last_steps: int = 1
    """Last steps that are always computed, >= 0."""
    max_consecutive_hits: int | None = 2
    """Compute after this many hits in a row, >= 1; None: no limit."""
    power: float = 3.0
    """How fast the power of a clean picture falls with the frequency, > 0."""
    aspect: float = 1.0
    """Width of the picture divided by its height, > 0, where latents are a row of tokens (FLUX, Qwen)."""

    def __post_init__(self) -> None:
        check("threshold", self.threshold, 0.0, float("inf"), "it is a summed change; 0 switches off")
        check("order", self.order, 0, 1, "0 reuses, 1 draws a line")
        check("warmup_steps", self.warmup_steps, 1, float("inf"), "the first step must be computed")
        check("last_steps", self.last_steps, 0, float("inf"), "it is a number of steps")
        check("power", self.power, 1e-3, 100.0, "it is an exponent")
        check("aspect", self.aspect, 1e-3, 1e3, "it is width / height")
        if self.max_consecutive_hits is not None:
            check("max_consecutive_hits", self.max_consecutive_hits, 1, float("inf"), "use None for no limit")

    @property
    def needs_total_steps(self) -> bool:
        return self.last_steps > 0

    def bytes_needed(self, shape: Shape) -> int:
        return (self.order + 1) * shape.tensor(shape.img) + shape.denoised

    def build(self) -> SeaCache:
        return SeaCache(self)


class SeaCache(Method):
    """Nothing of the stack runs on a hit."""

    config: SeaCacheConfig

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One denoising step of one branch."""
        cfg, blocks = self.config, range(stages[-1].last)
        rule = partial(weights.newton, order=cfg.order)
        slot = memory.slot("stack", lambda: Forecast(rule, cfg.order + 1))
        latents = yield Latents()
        seen = filtered(latents, noise_level(memory), cfg.power, cfg.aspect)
        change = slot.compare(seen.reshape(len(seen), 1, -1))  # against the previous step
        sums = memory.state("sums", lambda: [0.0] * memory.batch)  # per sample
        hit = [False] * memory.batch
        forced = memory.in_warmup(cfg.warmup_steps) or memory.in_last(cfg.last_steps)
        if change is not None and not forced:
            sums[:] = [s + c for s, c in zip(sums, change, strict=True)]
            hit = [self._below(s, n) for s, n in zip(sums, slot.hits_in_a_row, strict=True)]
        compared = None if change is None else list(sums)
        sums[:] = [s if h else 0.0 for s, h in zip(sums, hit, strict=True)]
        slot.refer(seen.reshape(len(seen), 1, -1))  # moves on hits too
        at = float(memory.step)
        if all(hit):
            yield Skip(blocks, slot.predictor.predict(at))
        else:
            stand_in = slot.predictor.predict(at, hit) if any(hit) else None
            ran = yield Run(blocks, kept=hit, stand_in=stand_in)
            slot.predictor.learn(Stream(ran.residual.img), at, kept=hit)
        slot.count_hits(hit)
        memory.record_stack(stages, compared, cfg.threshold, all(hit))

    def _below(self, total: float, hits: int) -> bool:
        most = self.config.max_consecutive_hits
        return math.isfinite(total) and total < self.config.threshold and (most is None or hits < most)


def noise_level(memory: Memory) -> float:
    """Noise of the current step in [0, 1]; of a loop without a scheduler the timestep says it."""
    step = memory.course_step  # first of all: asking may show that a new request began
    try:
        return memory.course.levels[step]
    except RuntimeError:
        time = memory.timestep
        return time / TRAINED if time > 1 else time


def filtered(latents: Tensor, level: float, power: float, aspect: float = 1.0) -> Tensor:
    """The latents as the filter for this noise level lets them through, in their own shape and dtype."""
    if latents.ndim == 3:  # (B, tokens, C), row by row of the picture
        height, width = grid(latents.shape[1], aspect)
        planes = latents.unflatten(1, (height, width)).movedim(-1, 1)
        return filtered(planes, level, power).movedim(1, -1).flatten(1, 2)
    wide, axes = latents.float(), tuple(range(2, latents.ndim))  # (B, C, [frames,] height, width)
    level = min(max(level, ENDS), 1 - ENDS)
    gain = torch.ones((), device=latents.device)
    for axis in axes:
        frequencies = torch.fft.fftfreq(wide.shape[axis], device=latents.device)
        clean = 1 / (frequencies.abs() ** power + LEAST)
        response = (1 - level) * clean / ((1 - level) ** 2 * clean + level**2 + LEAST)
        gain = gain * response.view([-1 if n == axis else 1 for n in range(wide.ndim)])
    spectrum = torch.fft.fftn(wide, dim=axes) * (gain / gain.mean())
    real = torch.fft.ifftn(spectrum, dim=axes).real.to(latents.dtype)
    return real.contiguous()  # in float32 a view of the complex numbers, which would be kept with it


def grid(tokens: int, aspect: float) -> tuple[int, int]:
    """Height and width of `tokens` tokens whose ratio is nearest to `aspect`."""
    heights = [h for h in range(1, tokens + 1) if tokens % h == 0]
    height = min(heights, key=lambda h: abs(math.log(tokens / h / h / aspect)))
    return height, tokens // height
