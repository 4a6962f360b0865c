"""What the methods that forecast on a schedule share: the history of whole stages, or of every module.

Used by TaylorSeer, HiCache, SpeCa and ClusCa; H2-Cache forecasts stages by its own rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from h2cache.memory import Memory
from h2cache.method import Shape
from h2cache.predictors import Forecast, combine
from h2cache.program import Drive, Program, Run, Skip, Stage
from h2cache.weights import Times

Rule = Callable[[Times, float], list[float]]
Key = tuple[int, str]  # block number and module name
GRANULARITIES = ("module", "stage")


class ModuleForecast:
    """The outputs of many modules at the last `states` computed steps, all forecast with the same weights.

    The outputs are kept as they come, by reference. A module may return a tensor or a tuple of tensors.
    """

    def __init__(self, rule: Rule, states: int) -> None:
        self.rule, self.states = rule, states
        self.times: list[float] = []
        self.outputs: dict[Key, list[tuple[Tensor, ...]]] = {}
        self.weights: list[float] = []

    @property
    def empty(self) -> bool:
        """Whether there is nothing to forecast from: the beginning, or all has been forgotten."""
        return not self.times

    def clear(self) -> None:
        """Forget all differences."""
        self.times.clear()
        self.outputs.clear()

    def compute(self, stages: tuple[Stage, ...], at: float) -> Program:
        """A step at time `at` in which every module runs and is learnt."""
        self.begin_computed(at)
        yield Drive(range(stages[-1].last), self.learn, counts=True)

    def forecast(self, stages: tuple[Stage, ...], at: float) -> Program:
        """A step at time `at` in which every module is forecast."""
        self.begin_forecast(at)
        yield Drive(range(stages[-1].last), self.predict, counts=False)

    def begin_computed(self, at: float) -> None:
        """A computed step begins."""
        self.times = [*self.times, at][-self.states :]

    def begin_forecast(self, at: float) -> None:
        """A forecast step begins."""
        self.weights = self.rule(self.times, at)

    def learn(self, index: int, name: str, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run a module and keep what it gives."""
        out = forward(*args, **kwargs)
        parts = (out,) if isinstance(out, Tensor) else tuple(out)
        kept = self.outputs.setdefault((index, name), [])
        kept.append(tuple(part.detach() for part in parts))
        del kept[: -len(self.times)]
        return out

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


def forecast_bytes(shape: Shape, granularity: str, states: int, stages: int = 2) -> int:
    """Bytes that a forecast of order `states` - 1 holds. FLUX.1-dev at 1024x1024, modules, order 1: 4104 MiB.

    Modules: attention and mlp of both streams in a double block, one joint output in a single block.
    """
    double, single = shape.blocks
    return states * (2 * double + single if granularity == "module" else stages) * shape.joint
