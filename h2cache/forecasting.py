"""What the methods that forecast on a schedule share: the history of whole stages, or of every module.

Used by TaylorSeer, HiCache, SpeCa and ClusCa; H2-Cache forecasts stages by its own rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from h2cache import weights
from h2cache.memory import Memory
from h2cache.method import Shape
from h2cache.predictors import Forecast, combine, factors
from h2cache.program import Drive, Program, Run, Skip, Stage
from h2cache.similarity import sample_mask
from h2cache.weights import Times

Rule = Callable[[Times, float], list[float]]
Key = tuple[int, str]  # block number and module name
GRANULARITIES = ("module", "stage")
BASES = ("taylor", "hermite")


def rule_of(basis: str, order: int, sigma: float) -> Rule:
    """Taylor's weights, or HiCache's scaled Hermite polynomials with the contraction `sigma`."""
    if basis == "hermite":
        return partial(weights.hermite, order=order, sigma=sigma)
    return partial(weights.taylor, order=order)


class ModuleForecast:
    """The outputs of many modules at the last `states` computed steps.

    The outputs are kept as they come, by reference. A module may return a tensor or a tuple of tensors.
    batch: how many samples are computed at steps of their own; 1: all at the same ones.
    """

    def __init__(self, rule: Rule, states: int, batch: int = 1) -> None:
        self.rule, self.states = rule, states
        self.times: list[list[float]] = [[] for _ in range(batch)]
        self.outputs: dict[Key, list[tuple[Tensor, ...]]] = {}
        self.weights: list[float | Tensor] = []
        self._kept: list[bool] = []

    @property
    def empty(self) -> bool:
        """Whether there is nothing to forecast from: the beginning, or all has been forgotten."""
        return not self.outputs

    def clear(self) -> None:
        """Forget all differences."""
        self.times = [[] for _ in self.times]
        self.outputs.clear()

    def compute(self, stages: tuple[Stage, ...], at: float) -> Program:
        """A step at time `at` in which every module runs and is learnt."""
        self.begin_computed(at)
        yield Drive(range(stages[-1].last), self.learn, counts=True, text=False)

    def forecast(self, stages: tuple[Stage, ...], at: float) -> Program:
        """A step at time `at` in which every module is forecast."""
        self.begin_forecast(at)
        yield Drive(range(stages[-1].last), self.predict, counts=False, text=False)

    def begin_computed(self, at: float, kept: Sequence[bool] = ()) -> None:
        """A computed step begins; of the samples marked in `kept` only a forecast is made."""
        self._kept = list(kept) if any(kept) else []
        if self._kept:
            self.begin_forecast(at)
        fresh = [not k for k in self._kept] or [True] * len(self.times)
        self.times = [
            [*times, at][-self.states :] if f else times for times, f in zip(self.times, fresh, strict=True)
        ]

    def begin_forecast(self, at: float) -> None:
        """A forecast step begins."""
        stored = next(iter(self.outputs.values()))
        self.weights = factors([self.rule(times, at) for times in self.times], len(stored), stored[0][0])

    def learn(self, index: int, name: str, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a module and keep what it gives."""
        out = forward(*args, **kwargs)
        new = tuple(part.detach() for part in ((out,) if isinstance(out, Tensor) else out))
        old = self.outputs.get((index, name), [])
        shifted = [*old, new]
        if self._kept:  # those samples are forecast, and keep what they had
            answer = self._mixed(new, combine(old, self.weights))
            shifted = [self._mixed(n, o) for n, o in zip(shifted, [old[0], *old], strict=True)]
            out = answer[0] if isinstance(out, Tensor) else answer
        self.outputs[index, name] = shifted[-self.states :]
        return out

    def _mixed(self, new: Sequence[Tensor], kept: Sequence[Tensor]) -> tuple[Tensor, ...]:
        mask = sample_mask(self._kept, new[0])
        return tuple(torch.where(mask, k, n) for n, k in zip(new, kept, strict=True))

    def predict(self, index: int, name: str, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the module would give, without running it."""
        parts = combine(self.outputs[index, name], self.weights)
        return parts[0] if len(parts) == 1 else tuple(parts)


class StageForecast:
    """The residuals of whole stages at the last `states` computed steps, each forecast by itself."""

    def __init__(self, rule: Rule, states: int) -> None:
        self.rule, self.states = rule, states
        self.stages: dict[str, Forecast] = {}

    @property
    def empty(self) -> bool:
        """Whether there is nothing to forecast from: the beginning, or all has been forgotten."""
        return not self.stages

    def clear(self) -> None:
        """Forget all differences."""
        self.stages.clear()

    def compute(self, stages: tuple[Stage, ...], at: float) -> Program:
        """A step at time `at` in which every stage runs and is learnt."""
        for stage in stages:
            ran = yield Run(stage.blocks)
            history = self.stages.setdefault(stage.name, Forecast(self.rule, self.states))
            history.learn(ran.residual, at)

    def forecast(self, stages: tuple[Stage, ...], at: float) -> Program:
        """A step at time `at` in which every stage is forecast."""
        for stage in stages:
            yield Skip(stage.blocks, self.stages[stage.name].predict(at))


def forecast_of(memory: Memory, granularity: str, rule: Rule, order: int) -> ModuleForecast | StageForecast:
    """What the branch keeps to forecast with `rule` of `order`; made at its first step."""
    kind = ModuleForecast if granularity == "module" else StageForecast
    return memory.state("forecast", lambda: kind(rule, order + 1))


def forecast_bytes(shape: Shape, granularity: str, states: int, stages: int = 2, text: bool = False) -> int:
    """Bytes that a forecast of order `states` - 1 holds. FLUX.1-dev at 1024x1024, modules, order 1: 3648 MiB.

    Modules: attention and mlp where they are apart, else one output of a block; with `text` of both streams.
    """
    if granularity == "stage":
        return states * stages * shape.joint
    per_state = module_tensors(shape) * shape.tensor(shape.img)
    if text:
        per_state += (2 * shape.blocks[0] + shape.blocks[1]) * shape.tensor(shape.txt)
    return states * per_state


def module_tensors(shape: Shape) -> int:
    """How many tensors of image tokens the modules of all blocks give."""
    apart, fused = shape.blocks
    attention = shape.attention_parts - 1  # one of its tensors is text
    return (attention + 1) * apart + fused
