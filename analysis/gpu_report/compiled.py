"""Compiled models: the whole one under the plan, blocks under the paper's rule; times, pictures, graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import h2cache
from analysis.gpu_report.context import Context, goal, spread, time_request
from analysis.gpu_report.models import INF, Loop, build, inputs_of, settings
from h2cache import H2Config, MethodConfig

STEPS = 8
PLAN = settings("plan", speedup=2.0, file="none")
EVERY_STEP = settings("plan", evaluations=STEPS)


def compiled(ctx: Context) -> Iterator[dict]:
    """A shallow FLUX in real width: uncompiled, compiled as a whole in two modes, and block by block."""
    backend: dict[str, Any] = {} if ctx.on_gpu else {"backend": "eager"}  # no compiler on a CPU: fast to test
    cases: dict[str, Callable[[Context, dict], Iterator[dict]]] = {
        "not compiled": lambda ctx, _: whole(ctx, None),
        "whole, fullgraph": lambda ctx, options: whole(ctx, {"fullgraph": True} | options),
        "blocks": blocks,
        "whole, fullgraph, CUDA graphs": lambda ctx, options: whole(
            ctx, {"fullgraph": True, "mode": "reduce-overhead"}
        ),
    }
    for name, case in cases.items():
        if "CUDA" in name and not ctx.on_gpu:
            yield {"model": name, "note": "not run: there is no CUDA device"}
            continue
        torch._dynamo.reset()
        counters.clear()
        try:
            for row in case(ctx, backend):
                yield ({"model": name} if "goal" not in row else {"detail": name}) | row
        except Exception as error:
            yield {"model": name, "error": f"{type(error).__name__}: {error}"[:600]}


def shallow(ctx: Context) -> tuple[Loop, dict]:
    """FLUX in real width (not if small) with few blocks, so that compiling takes seconds."""
    double, single = (2, 3) if ctx.small else (2, 4)
    model = build(double, single, ctx.small, ctx.device, ctx.dtype)
    return Loop(model), inputs_of(model, *ctx.tokens)


def draw(loop: Loop, inputs: dict, config: MethodConfig | None) -> Tensor:
    """The last latents of a request."""
    h2cache.disable(loop) if config is None else h2cache.enable(loop, config)
    return loop(inputs, STEPS)[-1].clone()


def graphs() -> Counter:
    """Graphs compiled so far, and breaks in them."""
    return Counter(graphs=counters["stats"]["unique_graphs"], breaks=sum(counters["graph_break"].values()))


def whole(ctx: Context, options: dict | None) -> Iterator[dict]:
    """The plan on the whole model; options: of `Module.compile`, None: it is not compiled."""
    loop, inputs = shallow(ctx)
    seconds: list[float] = []
    with ctx.timed(seconds):
        if options is not None:
            loop.transformer.compile(**options)
        loop(inputs, 2)
    right, first = draw(loop, inputs, None), graphs()
    every, planned = draw(loop, inputs, EVERY_STEP), draw(loop, inputs, PLAN)
    again, added = draw(loop, inputs, PLAN), graphs() - first
    yield {
        "what": "plan", "first call, s": round(seconds[0], 1), **first,
        "graphs more with the plan": added["graphs"], "breaks more with the plan": added["breaks"],
        "equal at every step evaluated": torch.equal(right, every),
        "equal twice": torch.equal(planned, again),
    }  # fmt: skip
    if options is not None:
        text = "equal to the compiled uncached picture with every step evaluated: differences"
        yield goal(text, int(not torch.equal(right, every)), 0, "")
        yield goal("graphs compiled more under the plan", added["graphs"], 0, "")
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(2 if ctx.small else 5):
        for name, config in (("uncached", None), ("plan", PLAN)):
            for kind, taken, _, _ in time_request(ctx, loop, inputs, config, STEPS):
                times.setdefault((name, kind), []).append(taken)
    for (name, kind), taken in times.items():
        yield {"what": f"{name}: {kind} step"} | spread(taken)


def blocks(ctx: Context, options: dict) -> Iterator[dict]:
    """Blocks compiled under the paper's rule: graphs after the first hit, miss, threshold change, size."""
    loop, inputs = shallow(ctx)
    config = H2Config(tau1=INF, tau2=INF, max_consecutive_hits=2)
    plain = draw(loop, inputs, config)  # not compiled
    h2cache.disable(loop)
    loop.transformer.compile_repeated_blocks(**options)
    # The first request compiles. Its first step takes a graph for fixed strides, later ones that for any
    # strides, which may add up in another order: so what is compared with is drawn after it.
    first = draw(loop, inputs, None)
    yield {"what": "uncached", **graphs()}
    right = draw(loop, inputs, None)
    again = torch.equal(right, draw(loop, inputs, None))
    yield {"what": "uncached again", "equal twice": again, "equal to the first": torch.equal(first, right)}
    other = inputs_of(loop.transformer, ctx.tokens[0] // 4, ctx.tokens[1], seed=1)
    kinds = {
        "misses": (inputs, H2Config(tau1=0.0, tau2=0.0)),
        "hits": (inputs, config),
        "another threshold": (inputs, H2Config(tau1=0.0, tau2=INF)),
        "another request": (inputs, config),
        "another size, uncached": (other, None),
        "another size": (other, config),
    }
    for name, (given, wanted) in kinds.items():
        before, latents = graphs(), draw(loop, given, wanted)
        added = graphs() - before
        row = {"what": name, "graphs": added["graphs"], "breaks": added["breaks"]}
        if name == "misses":
            row["equal to the compiled uncached picture"] = equal = torch.equal(right, latents)
        if name == "hits":
            change = (latents.float() - plain.float()).norm() / plain.float().norm()
            row["from the uncompiled run, relative"] = f"{float(change):.2e}"
        yield row
        if name == "misses" and again:
            yield goal("equal to the compiled uncached picture at zero: differences", int(not equal), 0, "")
        if wanted is not None:
            yield goal(f"graphs compiled more by {name}", added["graphs"], 0, "")
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(2 if ctx.small else 4):
        for name, wanted in (("uncached", None), ("h2cache", config)):
            for kind, taken, _, _ in time_request(ctx, loop, inputs, wanted, STEPS):
                times.setdefault((name, kind), []).append(taken)
    for (name, kind), taken in times.items():
        yield {"what": f"{name}: {kind} step"} | spread(taken)
