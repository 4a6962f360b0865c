"""Other summaries than the paper's: H2-Cache with any of them, and a probe that only looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig, check
from h2cache.policies import below
from h2cache.predictors import LastResidual
from h2cache.program import Program, Run, Skip, Stage


def average(features: Tensor, k: int) -> Tensor:
    """The paper's: means of k x k windows over neighbouring tokens and channels, (B, tokens // k, C // k)."""
    return F.avg_pool2d(features.unsqueeze(1), (k, min(k, features.shape[2]))).squeeze(1)


def maximum(features: Tensor, k: int) -> Tensor:
    """The authors' switched-off alternative: the largest value of each window."""
    return F.max_pool2d(features.unsqueeze(1), (k, min(k, features.shape[2]))).squeeze(1)


def stride(features: Tensor, k: int) -> Tensor:
    """Every k-th token and every k-th channel, as they are: the rest is never read."""
    return features[:, ::k, ::k]


KINDS: dict[str, Callable[[Tensor, int], Tensor]] = {"average": average, "maximum": maximum, "stride": stride}


@dataclass(frozen=True)
class Summary:
    """A kind of summary with the window of each stage's check; windows of 1: the full tensor."""

    kind: str
    structure: int
    detail: int

    def __str__(self) -> str:
        if self.structure == self.detail == 1:
            return "full tensor"
        windows = dict.fromkeys((str(self.structure), str(self.detail)))
        return f"{self.kind} {'/'.join(windows)}"

    def of(self, features: Tensor, stage: str) -> Tensor:
        """The summary of `features` (B, tokens, C) for the check of `stage`."""
        window = getattr(self, stage)
        return features if window == 1 else KINDS[self.kind](features, window)


FULL = Summary("average", 1, 1)
PAPER = Summary("average", 2, 12)  # the windows of FLUX.1-dev at 1024x1024
COMPARED = (
    FULL,
    PAPER,
    Summary("average", 2, 2),
    Summary("average", 4, 4),
    Summary("average", 8, 8),
    Summary("stride", 2, 12),
    Summary("stride", 4, 4),
    Summary("maximum", 2, 12),
)


@dataclass(frozen=True)
class SummaryConfig(MethodConfig):
    """H2-Cache, for one image at a time, with any summary in the place of PFS."""

    name = "h2cache_summary"

    tau1: float = 0.15
    """Structure threshold, a relative change >= 0."""
    tau2: float = 0.22
    """Detail threshold, a relative change >= 0."""
    summary: Summary = FULL
    """What the checks compare."""

    def __post_init__(self) -> None:
        for name in ("tau1", "tau2"):
            check(name, getattr(self, name), 0.0, float("inf"), "it is a relative change")
        if self.summary.kind not in KINDS:
            raise ValueError(f"summary {self.summary.kind!r} is unknown: choose one of {', '.join(KINDS)}")

    def build(self) -> WithSummary:
        return WithSummary(self)


class WithSummary(Method):
    """The paper's step; only what is compared differs."""

    config: SummaryConfig

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One denoising step of one branch."""
        cfg, hit = self.config, False
        for stage, tau in zip(stages, (cfg.tau1, cfg.tau2), strict=True):
            slot = memory.slot(stage.name, LastResidual)
            head = yield Run(stage.head)
            change, thresholds, forced = None, None, hit
            if not forced:
                summary = cfg.summary.of(stage.measured(head), stage.name)
                change, thresholds = slot.compare(summary), [tau] * memory.batch
                hit = change is not None and all(below(change, thresholds))
            if hit:
                yield Skip(stage.rest, slot.predictor.predict())
            else:
                rest = yield Run(stage.rest)
                slot.predictor.learn(rest.residual, kept=[False] * memory.batch)
                slot.refer(summary)
            memory.record(stage, change, thresholds, "forced" if forced else "hit" if hit else "miss")


@dataclass(frozen=True)
class ProbeConfig(MethodConfig):
    """Computes everything and shows `seen(stage, residual)` what the checks would look at."""

    name = "probe"

    seen: Callable[[str, Tensor], None] = field(default=lambda stage, residual: None)

    def build(self) -> Probe:
        return Probe(self)


class Probe(Method):
    """No cache at all."""

    config: ProbeConfig

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One denoising step of one branch."""
        for stage in stages:
            head = yield Run(stage.head)
            self.config.seen(stage.name, stage.measured(head))
            yield Run(stage.rest)
            memory.record(stage, None, None, "miss")
