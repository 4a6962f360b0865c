"""What the sections share: the device, how much time is left, and the large model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

import h2cache
from analysis.gpu_report.models import Loop, build, synchronise
from h2cache import MethodConfig


class OutOfTime(BaseException):
    """A section's time is over. No Exception, so that no library takes it for a fault of its own."""


@dataclass
class Context:
    """One run of the report."""

    device: str
    small: bool
    ends: float = 0.0  # of the present section, on the clock of `time.monotonic`
    kept: dict[str, FluxTransformer2DModel] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds that the present section has left."""
        return self.ends - time.monotonic()

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def tokens(self) -> tuple[int, int]:
        """Image and text tokens: those of 1024x1024, or few."""
        return (64, 16) if self.small else (4096, 512)

    def flux(self) -> FluxTransformer2DModel:
        """FLUX.1-dev with random weights: built once, uncached."""
        if "flux" not in self.kept:
            double, single = (3, 4) if self.small else (19, 38)
            self.kept["flux"] = build(double, single, self.small, self.device, self.dtype)
        return h2cache.disable(self.kept["flux"])

    def free(self) -> None:
        """Give the large model's memory back."""
        self.kept.clear()
        if self.on_gpu:
            torch.cuda.empty_cache()

    @contextmanager
    def timed(self, into: list[float]) -> Iterator[None]:
        """Seconds between two synchronisations: the time of the device and what the host adds to it."""
        synchronise(self.device)
        start = time.perf_counter()
        yield
        synchronise(self.device)
        into.append(time.perf_counter() - start)


def kinds_of_steps(target: Any, steps: int) -> list[tuple[str, int, int]]:
    """What became of each step of the newest request: in words, blocks executed, and blocks there are."""
    found, records = [], h2cache.step_records(target)
    for step in range(steps):
        own = [r for r in records if r.step == step]
        computed = ["computed" if r.outcome == "miss" else "skipped" for r in own]
        words = computed[:1] if len(set(computed)) == 1 else computed
        found.append((", ".join(words), sum(r.blocks_run for r in own), sum(r.blocks for r in own)))
    return found


def time_request(
    ctx: Context, loop: Loop, inputs: dict, config: MethodConfig | None, steps: int
) -> list[tuple[str, float, int, int]]:
    """Kind, seconds, blocks executed and all blocks of each step of a request but the first.

    The first begins the request, and has nothing to compare with.
    """
    h2cache.disable(loop) if config is None else h2cache.enable(loop, config)
    seconds: list[float] = []
    try:
        loop(inputs, steps, lambda step: ctx.timed(seconds))
        kinds = [("computed", 0, 0)] * steps if config is None else kinds_of_steps(loop, steps)
    finally:
        h2cache.disable(loop)
    return [(k, s, run, of) for (k, run, of), s in zip(kinds, seconds, strict=True)][1:]


def spread(seconds: list[float]) -> dict[str, Any]:
    """Median and quartiles in milliseconds, and how many there are."""
    ordered = sorted(seconds)
    low, _, high = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else ordered * 3
    middle = statistics.median(ordered)
    figures = {"ms, median": middle, "lower quartile": low, "upper quartile": high}
    return {k: round(1e3 * v, 4) for k, v in figures.items()} | {"repeats": len(ordered)}


def goal(name: str, value: float, limit: float, unit: str, detail: str = "") -> dict[str, Any]:
    """A record that says whether a measured value keeps its limit."""
    return {
        "goal": name, "value": round(value, 6), "limit": limit, "unit": unit, "reached": value <= limit,
        "detail": detail,
    }  # fmt: skip


def error_of(work: Callable[[], Any]) -> str:
    """The error of `work()` in a line; empty: there was none."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return ""
