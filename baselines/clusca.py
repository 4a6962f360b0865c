"""ClusCa: TaylorSeer along time, and on skipped steps one token of each cluster is computed for real.

Source: arXiv 2509.10312 (ACM MM 2025) and the authors' code. Image tokens are clustered at computed steps
after the last block with an mlp of its own (a double block of FLUX, every block of DiT); on a skipped step
these mlps run for one random token of each cluster. The authors do so with text too, of which nothing is
read on a skipped step.
As the authors', the next difference is taken against the corrected feature; that is 2 dB better on the
embedded model than differences between computed features alone (anchor=True). Hi-ClusCa (basis="hermite"):
the released code clusters once, at the first skipped step; here every computed step clusters again.
Deviations: each request has its own generator, whose numbers serve all images of a batch, so that each
comes out as it would alone; empty clusters take the token that lies farthest from its centre; clustering in
float32 with a fixed number of rounds, so that it never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from h2cache.forecasting import BASES, Key, ModuleForecast, Rule, forecast_bytes, rule_of
from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig, Shape, check
from h2cache.policies import interval_due
from h2cache.predictors import combine
from h2cache.program import Drive, Program, Stage, Stream

MLP = "ff"  # of image tokens, where it is apart from attention
ROUNDS = 10  # of k-means


@dataclass(frozen=True)
class ClusCaConfig(MethodConfig):
    """Settings of ClusCa. The authors' for FLUX.1-dev at 50 steps are the defaults (4.2x)."""

    name = "clusca"
    requires = frozenset({"modules"})
    instead = ': use taylorseer with granularity="stage"'

    interval: int = 5
    """A step is computed every so many steps, >= 1. Higher: faster, less faithful. 1: always compute."""
    order: int = 1
    """Order of the polynomial, 0 (plain reuse) to 4."""
    warmup_steps: int = 3
    """First steps that are always computed, >= 1."""
    clusters: int = 16
    """Clusters, and image tokens computed on skipped steps. 0: TaylorSeer."""
    gamma: float = 0.005
    """Weight of the cluster's computed token in all its tokens, in [0, 1]."""
    basis: str = "taylor"
    """"taylor", or "hermite" for Hi-ClusCa, with `sigma`."""
    sigma: float = 0.5
    """Contraction of the Hermite basis, in (0, 1]."""
    anchor: bool = False
    """Differences between computed features only [ours]; False: corrections enter them, as the authors'
    (exactly so for order 1)."""
    exact_fresh: bool = False
    """Computed tokens are used as they are [ours]; False: drift is added to them too, as the authors do."""
    seed: int = 0
    """Of the choice of tokens."""

    def __post_init__(self) -> None:
        check("interval", self.interval, 1, float("inf"), "it is a number of steps; 1 switches off")
        check("order", self.order, 0, 4, "higher differences are noise")
        check("warmup_steps", self.warmup_steps, 1, float("inf"), "the first step must be computed")
        check("clusters", self.clusters, 0, float("inf"), "it counts clusters; 0 is TaylorSeer")
        check("gamma", self.gamma, 0.0, 1.0, "it is a weight")
        if not 0 < self.sigma <= 1:
            raise ValueError(f"sigma={self.sigma!r} is out of range (0, 1]: it contracts")
        if self.basis not in BASES:
            raise ValueError(f"basis={self.basis!r} is unknown: choose 'taylor' or 'hermite'")

    @property
    def rule(self) -> Rule:
        """The forecasting rule."""
        return rule_of(self.basis, self.order, self.sigma)

    @property
    def undivided(self) -> str:
        return "clusca forms clusters of all tokens (clusters=0 does not)" if self.clusters else ""

    def bytes_needed(self, shape: Shape) -> int:
        return (
            forecast_bytes(shape, "module", self.order + 1)
            + shape.blocks[0] * shape.tensor(shape.img)  # corrected features of the mlps
            + shape.batch * shape.img * 8  # labels
            + shape.batch * self.clusters * shape.width * 4  # centres
        )

    def build(self) -> ClusCa:
        return ClusCa(self)


def cluster(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """k-means with L1 distance: labels (B, n) and centres (B, K, C) of tokens `x` (B, n, C), in float32.

    Starts from `centres`; a cluster that loses all its tokens takes the token farthest from its own centre.
    """
    x, count = x.float(), centres.shape[1]
    for _ in range(ROUNDS):
        distance, labels = torch.cdist(x, centres, p=1).min(-1)  # (B, n)
        member = torch.nn.functional.one_hot(labels, count).to(x.dtype)  # (B, n, K)
        sizes = member.sum(1)[..., None]  # (B, K, 1)
        means = member.transpose(1, 2) @ x / sizes.clamp(min=1)
        far = distance.argsort(-1, descending=True)  # (B, n)
        empty = sizes[..., 0] == 0
        rank = (empty.long().cumsum(-1) - 1).clamp(min=0)  # the n-th empty cluster takes the n-th farthest
        spare = x.gather(1, far.gather(1, rank)[..., None].expand(-1, -1, x.shape[-1]))
        centres = torch.where(empty[..., None], spare, means)
    return torch.cdist(x, centres, p=1).argmin(-1), centres


def pick(labels: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """A random member of each cluster, uniformly: (B, K) token numbers; token 0 for an empty cluster."""
    chance = torch.rand((1, labels.shape[1]), generator=generator, device=labels.device)  # for every sample
    member = labels[:, None, :] == torch.arange(count, device=labels.device)[None, :, None]  # (B, K, n)
    return torch.where(member, chance[:, None], -1.0).argmax(-1)


class Clusters:
    """Labels and centres of the image tokens, of one request and branch."""

    generator: torch.Generator
    labels: Tensor  # (B, n)
    centres: Tensor | None = None  # (B, K, C)

    def __init__(self) -> None:
        self.corrected: dict[Key, Tensor] = {}  # order-0 features of the mlps since the last computed step
        self._text_tokens = 0

    def update(self, stream: Stream, cfg: ClusCaConfig) -> None:
        """Cluster the tokens again, starting from the centres of the last time."""
        x = stream.img
        if self.centres is None:
            self.generator = torch.Generator(x.device).manual_seed(cfg.seed)
            order = torch.rand((1, x.shape[1]), generator=self.generator, device=x.device).argsort(-1)
            first = order[:, : min(cfg.clusters, x.shape[1]), None].expand(len(x), -1, x.shape[-1])
            self.centres = x.float().gather(1, first)
            self._text_tokens = 0 if stream.txt is None else stream.txt.shape[1]
            self._pass_over_text()
        self.labels, self.centres = cluster(x, self.centres)
        self.corrected.clear()

    def pick(self) -> Tensor:
        """A random member of each cluster: (B, K, 1) token numbers."""
        assert self.centres is not None, "nothing has been clustered"
        picked = pick(self.labels, self.centres.shape[1], self.generator)[..., None]
        self._pass_over_text()
        return picked

    def _pass_over_text(self) -> None:
        """Leave out the numbers that text tokens would take: pictures stay those of the records."""
        torch.rand((1, self._text_tokens), generator=self.generator, device=self.generator.device)


class ClusCa(Method):
    """Steps are computed on a schedule; in between, forecasts that a few computed tokens correct."""

    config: ClusCaConfig

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One denoising step of one branch."""
        cfg, at = self.config, float(memory.step)
        modules = memory.state("modules", lambda: ModuleForecast(cfg.rule, cfg.order + 1))
        clusters = memory.state("clusters", Clusters)
        apart, rest = range(memory.divided), range(memory.divided, stages[-1].last)
        full = interval_due(memory.step, cfg.interval, cfg.warmup_steps) or modules.empty
        if full:
            if not cfg.anchor:
                for key, base in clusters.corrected.items():
                    modules.outputs[key][-1] = (base,)
            if memory.step < cfg.warmup_steps - 1:  # differences count from the last warm-up step on
                modules.clear()
            modules.begin_computed(at)
            ran = yield Drive(apart, modules.learn, counts=True, text=False)
            if cfg.clusters:
                clusters.update(ran.after, cfg)
            yield Drive(rest, modules.learn, counts=True, text=False)
        else:
            modules.begin_forecast(at)
            answer = partial(self._answer, modules, clusters) if cfg.clusters else modules.predict
            yield Drive(range(stages[-1].last), answer, counts=False, text=False)
        memory.record_stack(stages, None, 0.0, not full)

    def _answer(
        self,
        modules: ModuleForecast,
        clusters: Clusters,
        index: int,
        name: str,
        forward: Callable,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Any:
        """A module's forecast; an mlp's with the chosen tokens computed for real."""
        if name != MLP:
            return modules.predict(index, name, forward, args, kwargs)
        cfg, key, idx = self.config, (index, name), clusters.pick()  # (B, K, 1)
        x = args[0]  # modulated input of this step, (B, n, C)
        fresh = forward(x.gather(1, idx.expand(-1, -1, x.shape[-1])))  # (B, K, C)
        rows = idx.expand_as(fresh)
        snapshots = modules.outputs[key]
        base = clusters.corrected.get(key, snapshots[-1][0]).scatter(1, rows, fresh)
        if cfg.gamma:
            spread = fresh.gather(1, clusters.labels[..., None].expand_as(base))
            base = torch.lerp(base, spread, cfg.gamma)
        drift = [*modules.weights[:-1], modules.weights[-1] - 1.0]  # what the forecast adds to the newest
        clusters.corrected[key] = base
        out = base + combine(snapshots, drift)[0] if any(drift) else base
        return out.scatter(1, rows, fresh) if cfg.exact_fresh else out
