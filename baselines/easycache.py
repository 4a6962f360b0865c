"""EasyCache: the change of the latents decides, times how strongly the output has answered to it lately.

Source: arXiv 2507.02860 and the authors' code for Wan 2.1 and HunyuanVideo; also in ComfyUI's core. Only
what goes into the model and comes out of it is seen, so it runs on any model. k = |dv| / |dx| between the
last two computed steps; k |dx| / |v| of each step is summed, and while the sum is below the threshold x +
(v' - x') of the last computed step stands in. Deviations: per-sample decisions; each guidance branch has
its own k and decides for itself (Wan's branch without the prompt follows the other one in their code);
where output and input differ in shape, the last output itself stands in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig, Shape, check
from h2cache.policies import below
from h2cache.program import Forward, Latents, Program, Stage, Stand
from h2cache.similarity import difference, magnitude, sample_mask


@dataclass(frozen=True)
class EasyCacheConfig(MethodConfig):
    """Settings of EasyCache. The authors' for HunyuanVideo; for Wan 2.1 they take threshold 0.05."""

    name = "easycache"
    requires = frozenset({"whole"})
    outputs_held = 1
    latents_held = 2

    threshold: float = 0.025
    """Limit of the summed expected change of the output, >= 0. Higher: faster. 0: always compute."""
    warmup_steps: int = 5
    """First steps that are always computed, >= 1; k is known after two. The authors: 5 of 50 for Hunyuan, 10
    of 50 for Wan."""
    last_steps: int = 1
    """Last steps that are always computed, >= 0."""
    reuse: str = "difference"
    """What of the last computed step stands in: "difference", output minus input; or "output"."""

    def __post_init__(self) -> None:
        check("threshold", self.threshold, 0.0, float("inf"), "it is a summed change; 0 switches off")
        check("warmup_steps", self.warmup_steps, 1, float("inf"), "the first step must be computed")
        check("last_steps", self.last_steps, 0, float("inf"), "it is a number of steps")
        if self.reuse not in ("difference", "output"):
            raise ValueError(f"reuse={self.reuse!r} is unknown: choose 'difference' or 'output'")

    @property
    def needs_total_steps(self) -> bool:
        return self.last_steps > 0

    def bytes_needed(self, shape: Shape) -> int:
        output = shape.tensor(shape.img, shape.out)
        return self.outputs_held * output + self.latents_held * shape.denoised

    def build(self) -> EasyCache:
        return EasyCache(self)


@dataclass
class Seen:
    """What a branch keeps: the latents of the previous and of the last computed step, its output, k."""

    sums: list[float]
    latents: Tensor | None = None
    computed: Tensor | None = None
    output: list[Tensor] = field(default_factory=list)
    rate: Tensor | None = None  # k, (B,)


class EasyCache(Method):
    """Answers for the whole model."""

    config: EasyCacheConfig

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One denoising step of one branch."""
        cfg = self.config
        latents = yield Latents()
        forced = memory.in_warmup(cfg.warmup_steps) or memory.in_last(cfg.last_steps)
        seen = memory.state("seen", lambda: Seen([0.0] * memory.batch))
        hit = [False] * memory.batch
        if seen.rate is not None and seen.latents is not None and not forced:
            change = seen.rate * apart(seen.latents, latents)
            expected = memory.ratio(change, size(seen.output, memory.batch))
            if expected is None:  # another request has begun
                seen = memory.state("seen", lambda: Seen([0.0] * memory.batch))
            else:
                seen.sums = [s + e for s, e in zip(seen.sums, expected, strict=True)]
                hit = below(seen.sums, [cfg.threshold] * memory.batch)
        seen.sums = [s if h else 0.0 for s, h in zip(seen.sums, hit, strict=True)]
        seen.latents = latents
        stand_in = self._stand_in(seen, latents) if any(hit) else []
        if all(hit):
            yield Stand(stand_in)
        else:
            result = yield Forward()
            self._learn(seen, latents, [part.detach().clone() for part in result], hit)
            if any(hit):
                yield Stand(chosen(hit, stand_in, result))
        memory.record_whole("hit" if all(hit) else "miss")

    def _stand_in(self, seen: Seen, latents: Tensor) -> list[Tensor]:
        then, output = seen.computed, seen.output
        if self.config.reuse == "output" or then is None or len(output) > 1:
            return output
        if output[0].shape not in (latents.shape, latents.shape[1:]):
            return output
        return [output[0] + (latents - then).reshape(output[0].shape).to(output[0].dtype)]

    def _learn(self, seen: Seen, latents: Tensor, output: list[Tensor], hit: list[bool]) -> None:
        """Keep a computed step, but for the samples that hit; the rate follows from the second on."""
        before, then, batch = seen.output, seen.computed, len(hit)
        if then is not None:
            moved = [new - old for new, old in zip(output, before, strict=True)]
            rate = (size(moved, batch) / apart(then, latents)).nan_to_num(0.0, posinf=math.inf)
            seen.rate = rate if seen.rate is None else chosen(hit, [seen.rate], [rate])[0]
            output, latents = chosen(hit, before, output), chosen(hit, [then], [latents])[0]
        seen.output, seen.computed = output, latents


def apart(a: Tensor, b: Tensor) -> Tensor:
    """mean |a - b| of each sample, (B,) float32."""
    return difference(a.reshape(len(a), 1, -1), b.reshape(len(b), 1, -1)) / a[0].numel()


def size(output: Sequence[Tensor], batch: int) -> Tensor:
    """mean |v| of each sample, (B,) float32; an output is a batch, or a tensor for each sample."""
    if len(output) == 1 or len(output) != batch:
        return magnitude(output[0].reshape(batch, 1, -1)) / (output[0].numel() / batch)
    return torch.cat([magnitude(part.reshape(1, 1, -1)) / part.numel() for part in output])


def chosen(hit: Sequence[bool], old: Sequence[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
    """`new`, but `old` of the samples that hit."""
    if not any(hit):
        return list(new)
    if len(new) == len(hit) > 1:
        return [o if h else n for h, o, n in zip(hit, old, new, strict=True)]
    return [
        torch.where(sample_mask(hit, n).view(-1, *[1] * (n.ndim - 1)), o, n)
        for o, n in zip(old, new, strict=True)
    ]
