"""Times of kinds of steps that take turns, by torch.utils.benchmark, and what they carry out."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable, Mapping

import torch
from diffusers import FirstBlockCacheConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Measurement, Timer

import h2cache
from h2cache import H2Config, MethodConfig

Step = Callable[[], torch.Tensor]
UNTIMED = 2  # calls that a Timer makes before it counts; one in a hundred where those are more


def in_turns(kinds: Mapping[str, Callable[[], Step]], rounds: int, burst: int) -> dict[str, Measurement]:
    """Seconds of a step of each kind: a burst of steps at a time, since in a run hits follow hits.

    kinds: what gets one ready, and returns the step. A round before those that count warms up.
    """
    found = []
    for turn in range(rounds + 1):
        for name, ready in kinds.items():
            timer = Timer(
                "step()", globals={"step": ready()}, sub_label=name, num_threads=torch.get_num_threads()
            )
            measurement = timer.timeit(burst)
            found += [measurement] if turn else []
    return {m.sub_label: m for m in Measurement.merge(found)}


def request(transformer: torch.nn.Module, inputs: dict, burst: int) -> Step:
    """What makes one step after the other of one request, with timesteps that fall, for one burst."""
    device, count = inputs["hidden_states"].device, 2 + burst + max(UNTIMED, burst // 100)
    timesteps = iter(torch.linspace(1.0, 0.5, count, device=device).split(1))

    def step() -> torch.Tensor:
        with torch.inference_mode(), transformer.cache_context("cond"):
            return transformer(**inputs | {"timestep": next(timesteps)})[0]

    return step


def begun(
    transformer: torch.nn.Module,
    inputs: dict,
    config: MethodConfig | FirstBlockCacheConfig | None,
    burst: int,
) -> Step:
    """The steps of a request after its first one, under the cache of one kind of step."""
    h2cache.disable(transformer)
    if getattr(transformer, "is_cache_enabled", False):
        transformer.disable_cache()
    if isinstance(config, FirstBlockCacheConfig):
        transformer.enable_cache(config)
    elif config is not None:
        h2cache.enable(transformer, config)
    step = request(transformer, inputs, burst)
    step()
    return step


def is_exact(transformer: torch.nn.Module, inputs: dict) -> bool:
    """Whether the output at zero thresholds is the uncached one, at a first and at a later step."""
    h2cache.disable(transformer)
    plain = request(transformer, inputs, 1)
    wanted = [plain(), plain()]
    h2cache.enable(transformer, H2Config(tau1=0, tau2=0))
    cached = request(transformer, inputs, 1)
    return all(torch.equal(picture, cached()) for picture in wanted)


class _Operations(TorchDispatchMode):
    """Counts what PyTorch carries out."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        return operation(*args, **(kwargs or {}))


def counted(ready: Callable[[], Step]) -> tuple[int, int]:
    """Tensor operations of a step, and calls from Python."""
    step, profile = ready(), cProfile.Profile()
    step()  # the first after a computed one measures the reference once
    with _Operations() as operations:
        step()
    profile.runcall(step)
    return operations.count, pstats.Stats(profile).total_calls
