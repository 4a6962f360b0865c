"""DiCache: a probe of the first blocks decides, and says how far along its last residuals the network is.

Source: arXiv 2508.17356 and the authors' code for FLUX.1-dev, HunyuanVideo and Wan 2.1. The first `depth`
blocks always run. Their change from step to step is summed; while the sum is below the threshold, all
blocks are taken to add r2 + gamma (r1 - r2): r1, r2 the residuals of the last two computed steps, gamma how
far the probe's own residual is from its second-last one, in units of the distance of its last two, in [1,
1.5]. A computed step goes on from the probe. Text is not cached. Deviations: per-sample decisions and
gamma, float32 means, the number of steps is the request's own, each guidance branch decides for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig, Shape, check
from h2cache.policies import below
from h2cache.program import Program, Run, Skip, Stage, Stream
from h2cache.similarity import difference, magnitude, sample_mask, settled

GAMMA = (1.0, 1.5)


@dataclass(frozen=True)
class DiCacheConfig(MethodConfig):
    """Settings of DiCache: the authors' for FLUX.1-dev at 30 steps."""

    name = "dicache"

    threshold: float = 0.4
    """Limit of the summed relative change, >= 0. Higher: faster, less faithful. 0: always compute."""
    retention: float = 0.2
    """Share of the steps at the beginning that is always computed, in [0, 1]; one step more than that."""
    depth: int = 1
    """Blocks of the probe, >= 1; they always run. The authors recommend 1 to 5."""
    error: str = "probe"
    """What is summed: "probe", the change behind the probe; "excess", how far it differs from the change of
    its input (the authors then take threshold 0.08 and retention 0)."""
    last_steps: int = 1
    """Last steps that are always computed, >= 0."""

    def __post_init__(self) -> None:
        check("threshold", self.threshold, 0.0, float("inf"), "it is a summed change; 0 switches off")
        check("retention", self.retention, 0.0, 1.0, "it is a share of the steps")
        check("depth", self.depth, 1, float("inf"), "the probe is one block at least")
        check("last_steps", self.last_steps, 0, float("inf"), "it is a number of steps")
        if self.error not in ("probe", "excess"):
            raise ValueError(f"error={self.error!r} is unknown: choose 'probe' or 'excess'")

    @property
    def needs_total_steps(self) -> bool:
        return True

    def bytes_needed(self, shape: Shape) -> int:
        return 6 * shape.tensor(shape.img)

    def build(self) -> DiCache:
        return DiCache(self)


@dataclass
class Course:
    """What a branch keeps of the image tokens: the previous step, and the last two computed ones."""

    sums: list[float]
    entered: Tensor | None = None  # the previous step's input
    probed: Tensor | None = None  # and what the probe made of it
    residuals: list[Tensor] = field(default_factory=list)  # of all blocks, oldest first
    probes: list[Tensor] = field(default_factory=list)  # of the probe alone
    learnt: list[int] = field(default_factory=list)  # computed steps, of each sample


class DiCache(Method):
    """One probe for the whole network."""

    config: DiCacheConfig

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One denoising step of one branch."""
        cfg, last = self.config, stages[-1].last
        depth = min(cfg.depth, last)
        probe = yield Run(range(depth))
        forced = memory.step <= int(cfg.retention * memory.total_steps) or memory.in_last(cfg.last_steps)
        course = memory.state("course", lambda: self._new(memory))
        entered, probed = probe.before.img, probe.after.img
        hit = [False] * memory.batch
        errors = None if forced else self._errors(course, entered, probed, memory)
        if errors is not None:
            course = memory.state("course", lambda: self._new(memory))
            course.sums = [s + e for s, e in zip(course.sums, errors, strict=True)]
            hit = below(course.sums, [cfg.threshold] * memory.batch)
        course = memory.state("course", lambda: self._new(memory))
        compared = None if errors is None else list(course.sums)
        course.sums = [s if h else 0.0 for s, h in zip(course.sums, hit, strict=True)]
        residual = probe.residual.img
        rest = range(depth, last)
        stand_in = Stream(self._forecast(course, residual) - residual) if any(hit) else None
        if stand_in is not None and all(hit):
            yield Skip(rest, stand_in)
        else:
            ran = yield Run(rest, kept=hit, stand_in=stand_in)
            whole = residual if ran is None else residual + ran.residual.img
            course.residuals = _with(course.residuals, whole, hit)
            course.probes = _with(course.probes, residual, hit)
            course.learnt = [n + (not h) for n, h in zip(course.learnt, hit, strict=True)]
        course.entered, course.probed = settled(entered), settled(probed)
        memory.record_stack(stages, compared, cfg.threshold, all(hit))

    def _new(self, memory: Memory) -> Course:
        return Course([0.0] * memory.batch, learnt=[0] * memory.batch)

    def _errors(self, course: Course, entered: Tensor, probed: Tensor, memory: Memory) -> list[float] | None:
        """The change since the previous step, of each sample; None without one, or if that was no part of
        this request."""
        if course.entered is None or course.probed is None:
            return None
        drawn = slice(None) if memory.targets is None else memory.targets
        parts = [(course.probed, probed), (course.entered, entered)][: 1 + (self.config.error == "excess")]
        found = []
        for old, new in parts:
            change = memory.ratio(difference(old[:, drawn], new[:, drawn]), magnitude(old[:, drawn]))
            if change is None:
                return None
            found.append(change)
        return found[0] if len(found) == 1 else [abs(a - b) for a, b in zip(*found, strict=True)]

    def _forecast(self, course: Course, probe: Tensor) -> Tensor:
        """r2 + gamma (r1 - r2); the last residual of samples that have no other."""
        newest = course.residuals[-1]
        if len(course.residuals) < 2:
            return newest
        older, (probe2, probe1) = course.residuals[0], course.probes
        gamma = (difference(probe2, probe) / difference(probe2, probe1)).nan_to_num(1.0).clamp(*GAMMA)
        gamma = torch.where(torch.tensor([n < 2 for n in course.learnt], device=gamma.device), 1.0, gamma)
        moved = gamma.view(-1, 1, 1) * (newest.float() - older.float())
        return (older.float() + moved).to(newest.dtype)


def _with(kept: list[Tensor], new: Tensor, hit: Sequence[bool]) -> list[Tensor]:
    """The newest two of `kept` and `new`; samples that hit keep what they had."""
    shifted = [*kept, settled(new)]
    if any(hit) and kept:
        mask, olds = sample_mask(hit, new), [kept[0], *kept]
        shifted = [torch.where(mask, old, now) for now, old in zip(shifted, olds, strict=True)]
    return shifted[-2:]
