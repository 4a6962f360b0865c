"""TaylorSeer-Lite: one tensor of the whole network is forecast, and everything before it is skipped.

Source: the TaylorSeer repository's HunyuanImage-2.1 code. lite_at="output", as that code does, forecasts what
the last layer gives (after norm and projection: the output itself). "hidden" forecasts what all blocks add
to the embedded image, so that the embedding, final modulation and projection stay fresh.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import zeros

from h2cache import weights
from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig, Shape, check
from h2cache.policies import interval_due
from h2cache.predictors import Forecast
from h2cache.program import Output, Program, Run, Skip, Stage, Stream


@dataclass(frozen=True)
class TaylorSeerLiteConfig(MethodConfig):
    """Settings of TaylorSeer-Lite: the authors' fast mode; medium is interval 4, detailed 3."""

    name = "taylorseer_lite"
    instead = ': use lite_at="hidden"'

    interval: int = 5
    """A step is computed every so many steps, >= 1. Higher: faster, less faithful. 1: always compute."""
    order: int = 2
    """Order of the polynomial, 0 (plain reuse) to 4."""
    warmup_steps: int = 3
    """First steps that are always computed, >= 1."""
    lite_at: str = "output"
    """"output": the model's output, some MiB; "hidden": what the blocks add to the image tokens."""

    def __post_init__(self) -> None:
        check("interval", self.interval, 1, float("inf"), "it is a number of steps; 1 switches off")
        check("order", self.order, 0, 4, "higher differences are noise")
        check("warmup_steps", self.warmup_steps, 1, float("inf"), "the first step must be computed")
        if self.lite_at not in ("output", "hidden"):
            raise ValueError(f"lite_at={self.lite_at!r} is unknown: choose 'output' or 'hidden'")

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"output"} if self.lite_at == "output" else ())

    def bytes_needed(self, shape: Shape) -> int:
        width = shape.out if self.lite_at == "output" else shape.width
        return (self.order + 1) * shape.tensor(shape.img, width)

    def build(self) -> TaylorSeerLite:
        return TaylorSeerLite(self)


class TaylorSeerLite(Method):
    """TaylorSeer of one tensor."""

    config: TaylorSeerLiteConfig

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One denoising step of one branch."""
        cfg, at, blocks = self.config, float(memory.step), range(stages[-1].last)
        slot = memory.slot("lite", lambda: Forecast(partial(weights.taylor, order=cfg.order), cfg.order + 1))
        full = interval_due(memory.step, cfg.interval, cfg.warmup_steps) or not slot.predictor.times
        if full and memory.step < cfg.warmup_steps - 1:
            slot.clear()  # differences count from the last warm-up step on
        at_output = cfg.lite_at == "output"
        if full:
            ran = yield Run(blocks)
            if not at_output:
                slot.predictor.learn(Stream(ran.residual.img), at=at)
        else:  # where the output is forecast, what the blocks would have added does not matter
            yield Skip(blocks, Stream(zeros(())) if at_output else slot.predictor.predict(at))
        if at_output:
            yield Output(
                partial(self._learn, slot.predictor, at) if full else partial(self._answer, slot, at)
            )
        memory.record_stack(stages, None, 0.0, not full)

    def _learn(self, predictor: Forecast, at: float, forward, args: tuple, kwargs: dict):
        out = forward(*args, **kwargs)
        predictor.learn(Stream(out), at=at)
        return out

    def _answer(self, slot, at: float, forward, args: tuple, kwargs: dict):
        return slot.predictor.predict(at).img
