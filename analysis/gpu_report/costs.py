"""What every method keeps in memory, against its own estimate; and how often it waits for the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import h2cache
from analysis.gpu_report.context import Context, error_of, goal, kinds_of_steps
from analysis.gpu_report.models import SKIPPING, SOME_HITS, Loop, build, inputs_of, settings

MIB = 2**20
STEPS = 6
WAITING = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "aten::_local_scalar_dense",
)
SLACK = 2 * MIB  # the allocator rounds up


def memory(ctx: Context) -> Iterator[dict]:
    """Peak and held bytes of a request of each method, less those of an uncached one."""
    model = ctx.flux()
    loop, inputs = Loop(model), inputs_of(model, *ctx.tokens)
    loop(inputs, 1)  # workspaces of the libraries below PyTorch are made once
    peak0, after0, _ = used(ctx, loop, inputs)
    over = []
    for method in SKIPPING:
        row: dict[str, Any] = {"method": method}

        def measure(method: str = method, row: dict = row) -> None:
            h2cache.enable(loop, settings(method, **SOME_HITS))
            peak, after, left = used(ctx, loop, inputs)
            told = h2cache.summary(loop)
            row |= {
                "stated, MiB": told.bytes_needed / MIB,
                "counted by the library, MiB": told.bytes_held / MIB,
            }
            if ctx.on_gpu:
                held = max(a - b for a, b in zip(after, after0, strict=True))
                row |= {"held, MiB": held / MIB, "peak over uncached, MiB": (peak - peak0) / MIB}
                row |= {"left at the end, MiB": left / MIB}
                if held > told.bytes_needed + SLACK:
                    over.append(method)

        if error := error_of(measure):
            row["error"] = error
        h2cache.disable(loop)
        yield {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}
    if ctx.on_gpu:
        yield {"method": "uncached", "peak, MiB": round(peak0 / MIB, 1)}
        yield goal("methods that hold more than they state", len(over), 0, "", ", ".join(over))


def used(ctx: Context, loop: Loop, inputs: dict) -> tuple[int, list[int], int]:
    """Peak of a request, what is allocated after each model call, and what is left after the last."""
    if not ctx.on_gpu:
        loop(inputs, STEPS)
        return 0, [0] * STEPS, 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, after = torch.cuda.memory_allocated(), []

    @contextmanager
    def noted(step: int) -> Iterator[None]:
        yield
        after.append(torch.cuda.memory_allocated())

    loop(inputs, STEPS, noted)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), after, torch.cuda.memory_allocated() - before


def waits(ctx: Context) -> Iterator[dict]:
    """Waits of each step after the first of a request, by PyTorch's own warnings and by the profiler."""
    model = build(2, 3, ctx.small, ctx.device, ctx.dtype)
    loop, inputs = Loop(model), inputs_of(model, 256 if ctx.on_gpu else 64, 64 if ctx.on_gpu else 16)
    plain, profiled = counted(ctx, loop, inputs), by_profiler(ctx, loop, inputs)
    yield {"method": "uncached", "waits at each step": str(plain), "of a request, profiler": str(profiled)}
    many = []
    for method in SKIPPING:
        row: dict[str, Any] = {"method": method}

        def measure(method: str = method, row: dict = row) -> None:
            h2cache.enable(loop, settings(method, **SOME_HITS))
            loop(inputs, STEPS)  # warm-up
            own = [a - b for a, b in zip(counted(ctx, loop, inputs), plain, strict=True)]
            allowed = decisions(loop, method)
            kinds = [kind for kind, _, _ in kinds_of_steps(loop, STEPS)]
            row |= {"steps": " / ".join(kinds), "decisions": str(allowed), "waits at each step": str(own)}
            row["of a request, profiler"] = str(by_profiler(ctx, loop, inputs))
            if any(a > b for a, b in zip(own[1:], allowed[1:], strict=True)):
                many.append(method)

        if error := error_of(measure):
            row["error"] = error
        h2cache.disable(loop)
        yield row
    if ctx.on_gpu:
        text = "methods that wait oftener than once for a decision, steps 1 to the last"
        yield goal(text, len(many), 0, "", ", ".join(many))


def decisions(target: Any, method: str) -> list[int]:
    """How many measures each step's decision rests on; the plan decides before the first step."""
    records = h2cache.step_records(target)
    measured = [sum(r.measure is not None for r in records if r.step == step) for step in range(STEPS)]
    if method == "plan":
        return [0] * STEPS
    return measured if method == "h2cache" else [min(1, count) for count in measured]


def counted(ctx: Context, loop: Loop, inputs: dict) -> list[int]:
    """Synchronising CUDA operations in the model's call, step by step; on a CPU there are none."""
    found: list[int] = []

    @contextmanager
    def watched(step: int) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found.append(sum("synchronizing CUDA operation" in str(w.message) for w in told))

    loop(inputs, STEPS, *([watched] if ctx.on_gpu else []))
    return found or [0] * STEPS


def by_profiler(ctx: Context, loop: Loop, inputs: dict) -> dict[str, int]:
    """The profiler's count of what waits, over a request with its scheduler; -1: no time was left."""
    if ctx.left < 3:
        return {"not counted": -1}
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * ctx.on_gpu
    with profile(activities=activities) as profiler:
        loop(inputs, STEPS)
    events = {event.key: event.count for event in profiler.key_averages()}
    copies = sum(count for name, count in events.items() if "Memcpy DtoH" in name)
    return {name: events[name] for name in WAITING if name in events} | (
        {"Memcpy DtoH": copies} if copies else {}
    )
