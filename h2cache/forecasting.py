"""What the methods that forecast on a schedule share: whole stages, or every module by itself.

Used by TaylorSeer, HiCache, SpeCa and ClusCa; H2-Cache forecasts stages by its own rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from h2cache.predictors import Forecast, combine
from h2cache.stages import Drive, Run, Skip

if TYPE_CHECKING:
    from h2cache.memory import Memory
    from h2cache.method import Shape
    from h2cache.stages import Program, Span
    from h2cache.weights import Times

Rule = Callable[["Times", float], list[float]]
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

    def clear(self) -> None:
        """Forget all differences."""
        self.times.clear()
        self.outputs.clear()

    def compute(self, at: float) -> None:
        """A computed step begins."""
        self.times = [*self.times, at][-self.states :]

    def forecast(self, at: float) -> None:
        """A skipped step begins."""
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


def forecast_step(
    stages: tuple[Span, ...],
    memory: Memory,
    granularity: str,
    rule: Rule,
    states: int,
    full: bool,
    alone: bool,
) -> Program:
    """One step of a method on a schedule: everything computed and learnt, or everything forecast.

    alone: this computed step starts afresh, as the authors do in the warm-up, whose early steps say little
    about the slope that is needed later. A step with nothing to forecast from is computed too: a ControlNet
    or IP-Adapter has come or gone, and all is forgotten.
    """
    at = float(memory.step)
    if granularity == "module":
        modules = memory.slot("modules", lambda: ModuleForecast(rule, states)).predictor
        full = full or not modules.times
        if full:
            if alone:
                modules.clear()
            modules.compute(at)
            yield Drive(range(stages[-1].last), modules.learn, counts=True)
        else:
            modules.forecast(at)
            yield Drive(range(stages[-1].last), modules.predict, counts=False)
    else:
        for stage in stages:
            slot = memory.slot(stage.name, lambda: Forecast(rule, states))
            full = full or not slot.predictor.times
            if full:
                ran = yield Run(stage.blocks)
                if alone:
                    slot.clear()
                slot.predictor.learn(ran.residual, at=at)
            else:
                yield Skip(stage.blocks, slot.predictor.predict(at))
    memory.record_stack(stages, None, 0.0, not full)


def forecast_bytes(shape: Shape, granularity: str, states: int, stages: int = 2) -> int:
    """Bytes that a forecast of order `states` - 1 holds. FLUX.1-dev at 1024x1024, modules, order 1: 4104 MiB.

    Modules: attention and mlp of both streams in a double block, one joint output in a single block.
    """
    double, single = shape.blocks
    return states * (2 * double + single if granularity == "module" else stages) * shape.joint
