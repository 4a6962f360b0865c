"""H2-Cache: a structure stage and a detail stage, each with its own check and its own threshold.

Source: "H2-Cache" (arXiv 2510.27171) and the authors' code, whose published numbers this follows: the measure
is the relative L1 change of the head block's pooled residual against the last *computed* step.
Deviations: checks are made per sample, pooled references are stored instead of full ones, the pooling window
is at least 1, and a non-finite measure computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from h2cache import predictors
from h2cache.memory import Memory, Slot
from h2cache.method import Method, MethodConfig, Shape, check
from h2cache.policies import SmartThreshold, below
from h2cache.program import Program, Run, Skip, Stage
from h2cache.similarity import pooling_window


@dataclass(frozen=True)
class H2Config(MethodConfig):
    """Settings of H2-Cache. The defaults are the authors' for FLUX.1-dev at 1024x1024 and 50 to 100 steps."""

    name = "h2cache"

    tau1: float = 0.15
    """Structure threshold, a relative change >= 0. Higher: faster, the layout drifts. 0: always compute."""
    tau2: float = 0.22
    """Detail threshold, a relative change >= 0. Higher: faster, textures and letters blur. 0: compute."""
    pool1: int = 2048
    """PFS of the structure check: image tokens kept at least (window = tokens // pool1)."""
    pool2: int = 384
    """PFS of the detail check: joint tokens kept at least. Another pool asks for other thresholds."""
    window1: int = 1
    """PFS of the structure check: the smallest window, >= 1. The paper's rule does not pool below 1024x1024
    here; 2 keeps as small a share of small pictures as there [ours], and asks for lower thresholds."""
    window2: int = 1
    """The same of the detail check; 12 is the share of 1024x1024."""
    reduce: str = "sample"
    """"sample": every image decides for itself, and comes out as it would alone; "mean": one measure over the
    batch, as the authors do. Images that do not agree cost blocks: a step is skipped for all or for none."""
    warmup_steps: int = 0
    """First steps that are always computed, in steps. Raising it costs speed and fixes the layout."""
    last_steps: int = 0
    """Last steps that are always computed, in steps. Needs a pipeline, or enable(..., steps=N)."""
    max_consecutive_hits: int | None = None
    """Compute a stage after this many hits in a row, >= 1; None: no limit. Lower: slower and closer."""
    adaptive: bool = False
    """Replace tau1 and tau2 by the authors' SmartThreshold (it needs the step count)."""
    adaptive_lowest: float = 0.05
    """Adaptive threshold at both ends of the run, in [0, adaptive_highest]."""
    adaptive_highest: float = 0.5
    """Adaptive threshold in the middle of the run."""
    predictor: str = "last"
    """What stands in: "last" as in the paper, or a forecast [ours]: "taylor", "newton", "hermite",
    "taylor_scaled", "dmd"; see `predictors.py`."""
    order: int = 1
    """Order of the forecasting polynomial, 1 to 4. Each costs one more joint state; 2 amplifies noise."""
    sigma: float = 0.5
    """Contraction of "hermite" and "taylor_scaled", in (0, 1]. Lower: closer to plain reuse."""
    clock: str = "step"
    """What a forecast is a function of [ours]: "step", the step index, or "sigma", the noise level."""
    repay: bool = False
    """Pay back forecasting errors at the next stand-in [ours], for Euler samplers; see `predictors.py`."""
    force_detail_hit: bool = True
    """A structure hit forces the detail hit, as in the paper. False [ours]: tau2 is asked there too."""

    def __post_init__(self) -> None:
        for field in ("tau1", "tau2"):
            check(
                field,
                getattr(self, field),
                0.0,
                float("inf"),
                "a threshold is a relative change; 0 switches off",
            )
        for field in ("pool1", "pool2", "window1", "window2"):
            check(field, getattr(self, field), 1, float("inf"), "it is a number of tokens")
        for field in ("warmup_steps", "last_steps"):
            check(field, getattr(self, field), 0, float("inf"), "it is a number of steps")
        if self.max_consecutive_hits is not None:
            check("max_consecutive_hits", self.max_consecutive_hits, 1, float("inf"), "use None for no limit")
        check(
            "adaptive_lowest",
            self.adaptive_lowest,
            0.0,
            self.adaptive_highest,
            "it must not exceed adaptive_highest",
        )
        if self.reduce not in ("sample", "mean"):
            raise ValueError(f"reduce={self.reduce!r} is unknown: choose 'sample' or 'mean'")
        check("order", self.order, 1, 4, "higher orders only amplify noise")
        if not 0 < self.sigma <= 1:
            raise ValueError(f"sigma={self.sigma!r} is out of range (0, 1]: it contracts")
        if self.clock not in ("step", "sigma"):
            raise ValueError(f"clock={self.clock!r} is unknown: choose 'step' or 'sigma'")
        self.new_predictor()  # refuses an unknown one

    def new_predictor(self) -> predictors.Predictor:
        """An empty predictor for one stage."""
        return predictors.build(self.predictor, self.order, self.sigma, self.repay)

    @property
    def states(self) -> int:
        """How many residuals the predictor of a stage holds."""
        return predictors.states(self.predictor, self.order, self.repay)

    @property
    def needs_total_steps(self) -> bool:
        return self.adaptive or self.last_steps > 0

    def bytes_needed(self, shape: Shape) -> int:
        summaries = 0
        for tokens, pool in zip(shape.compared, self._pools, strict=True):
            k = int(pooling_window(tokens, *pool))
            summaries += shape.tensor(tokens // k, shape.width // min(k, shape.width))
        return 2 * self.states * shape.joint + summaries

    @property
    def _pools(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Tokens kept and smallest window, of the structure and the detail check."""
        return (self.pool1, self.window1), (self.pool2, self.window2)

    def build(self) -> Method:
        return H2Cache(self)


class H2Cache(Method):
    """The paper's method; `step` is the algorithm."""

    config: H2Config

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One denoising step of one branch (the numbers are the steps of the paper's Algorithm)."""
        cfg, hit = self.config, [False] * memory.batch  # per sample
        if self._computes_blindly(memory):
            yield from compute_all(stages, memory)
            return
        for stage, tau, pool in zip(stages, (cfg.tau1, cfg.tau2), cfg._pools, strict=True):
            slot = memory.slot(stage.name, cfg.new_predictor)
            head = yield Run(stage.head)  # 1: a stage's head always runs
            change, thresholds, forced = None, None, all(hit) and cfg.force_detail_hit
            if not forced:  # 2: a structure hit forces the detail hit, without a look
                summary = memory.pooled(stage.measured(head), *pool)
                change = slot.compare(summary, per_sample=cfg.reduce == "sample")
                thresholds = self._thresholds(tau, stage, memory)
                hit = self._hits(hit, change, thresholds, slot, stage, memory)
            at = memory.time(cfg.clock)
            guess = partial(slot.predictor.predict, at, hit, memory.step_length)
            if all(hit):
                yield Skip(stage.rest, guess())  # 3: the head's fresh output + the stored residual
            else:
                rest = yield Run(stage.rest, kept=hit, stand_in=guess() if any(hit) else None)
                slot.predictor.learn(rest.residual, at, kept=hit)  # 4: from the head's output to the end
                slot.refer(summary, kept=hit)  # the reference is written on a miss only
            if cfg.max_consecutive_hits is not None:
                slot.count_hits(hit)
            memory.record(stage, change, thresholds, "forced" if forced else "hit" if all(hit) else "miss")

    def _hits(
        self,
        before: list[bool],
        change: list[float] | None,
        thresholds: list[float],
        slot: Slot,
        stage: Stage,
        memory: Memory,
    ) -> list[bool]:
        """Which samples may reuse this stage; a sample that hit the stage `before` stays a hit."""
        cfg = self.config
        before = before if cfg.force_detail_hit else [False] * memory.batch
        if change is None or memory.in_warmup(cfg.warmup_steps) or memory.in_last(cfg.last_steps):
            return [False] * memory.batch
        fresh = below(change, thresholds)
        if cfg.max_consecutive_hits is not None:
            hits = zip(fresh, slot.hits_in_a_row, strict=True)
            fresh = [f and n < cfg.max_consecutive_hits for f, n in hits]
        if cfg.adaptive:
            means = self._means(stage, memory)
            for n, (hit, c) in enumerate(zip(before, change, strict=True)):
                if not hit:
                    means[n] = self._smart.update(means[n], c)
        return [h or f for h, f in zip(before, fresh, strict=True)]

    def _thresholds(self, tau: float, stage: Stage, memory: Memory) -> list[float]:
        if not self.config.adaptive:
            return [tau] * memory.batch
        means = self._means(stage, memory)
        return [self._smart.threshold(memory.step, memory.total_steps, mean) for mean in means]

    @property
    def _smart(self) -> SmartThreshold:
        return SmartThreshold(self.config.adaptive_lowest, self.config.adaptive_highest)

    def _means(self, stage: Stage, memory: Memory) -> list[float | None]:
        """The running mean of the changes, of each sample."""
        return memory.state(f"means of {stage.name}", lambda: [None] * memory.batch)

    def _computes_blindly(self, memory: Memory) -> bool:
        """Whether the settings fix this step and no later one learns from it: engines may fuse its blocks."""
        cfg = self.config
        fixes = cfg.warmup_steps or cfg.last_steps
        return bool(fixes) and memory.computes_blindly(cfg.warmup_steps, cfg.last_steps, cfg.states)


def compute_all(stages: tuple[Stage, ...], memory: Memory) -> Program:
    """A step that computes every block and learns nothing."""
    yield Run(range(stages[-1].last))
    for stage in stages:
        memory.record(stage, None, None, "miss")
