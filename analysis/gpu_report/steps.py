"""How long each kind of step takes at FLUX.1-dev's real shapes, all contestants in turn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch

from analysis.drawing.transformer import only_heads
from analysis.gpu_report.context import Context, error_of, goal, spread, time_request
from analysis.gpu_report.models import INF, SKIPPING, SOME_HITS, Loop, inputs_of, settings
from h2cache import H2Config, MethodConfig
from h2cache.similarity import pooled_summary, relative_l1

HEADS = "two head blocks alone"
UNCACHED, ALL_COMPUTED = "uncached", "h2cache, tau 0 and 0"
ALL_REUSED = "h2cache, tau inf and inf"
PAPER: dict[str, tuple[MethodConfig | None, int]] = {  # settings, and steps of a request
    UNCACHED: (None, 3),
    HEADS: (None, 5),
    ALL_COMPUTED: (H2Config(tau1=0.0, tau2=0.0), 3),
    "h2cache, tau 0 and inf": (H2Config(tau1=0.0, tau2=INF), 4),
    ALL_REUSED: (H2Config(tau1=INF, tau2=INF), 5),
    "plan": (settings("plan", speedup=2.0, file="none"), 6),
}
OTHERS: dict[str, tuple[MethodConfig | None, int]] = {
    "block_cache, threshold 0": (settings("block_cache", threshold=0.0), 3),
    "block_cache, threshold inf": (settings("block_cache", threshold=INF), 5),
} | {
    name: (settings(name, **SOME_HITS), 6)
    for name in SKIPPING
    if name not in ("h2cache", "plan", "block_cache")
}
Times = dict[tuple[str, str, int, int], list[float]]


def steps(ctx: Context) -> Iterator[dict]:
    """Batch 1 with every method, then batch 4 with the paper's rule and the plan."""
    ends = ctx.ends
    ctx.ends -= 0.4 * ctx.left
    yield from of_batch(ctx, 1, PAPER | OTHERS)
    ctx.ends = ends
    yield from of_batch(ctx, 4, PAPER)


def of_batch(ctx: Context, batch: int, contestants: dict) -> Iterator[dict]:
    """Rounds in which every contestant has a request, as many as there is time for; then the table."""
    model, (tokens, text) = ctx.flux(), ctx.tokens
    loops = {HEADS: Loop(only_heads(model))} if HEADS in contestants else {}
    loop, inputs = Loop(model), inputs_of(model, tokens, text, batch)
    times: Times = defaultdict(list)
    failed: dict[str, str] = {}
    round_seconds: list[float] = []
    while not round_seconds or (ctx.left > 1.2 * round_seconds[-1] and len(round_seconds) < 12):
        before, found = ctx.left, defaultdict(list)
        for name, (config, count) in contestants.items():
            if name in failed:
                continue

            def request(name: str = name, config=config, count: int = count, found: Times = found) -> None:
                for kind, seconds, run, of in time_request(ctx, loops.get(name, loop), inputs, config, count):
                    found[name, kind, run, of].append(seconds)

            if error := error_of(request):
                failed[name] = error
        round_seconds.append(before - ctx.left)
        if len(round_seconds) == 2:  # the first round warmed up
            times.clear()
        for key, values in found.items():
            times[key] += values
    yield from table(ctx, batch, times, failed, len(round_seconds))
    yield from checks(ctx, batch, times)


def median(times: Times, name: str, kind: str) -> float | None:
    """Milliseconds of a kind of step, None if there was none."""
    found = [s for (n, k, _, _), values in times.items() if (n, k) == (name, kind) for s in values]
    return spread(found)["ms, median"] if found else None


def table(ctx: Context, batch: int, times: Times, failed: dict[str, str], rounds: int) -> Iterator[dict]:
    """A row for each kind of step, and the goals."""
    full = median(times, UNCACHED, "computed")
    for (name, kind, run, of), seconds in times.items():
        row = {"batch": batch, "contestant": name, "step": kind, "blocks": f"{run} of {of}" if of else ""}
        figures = spread(seconds)
        share = {"share of a full step, %": round(100 * figures["ms, median"] / full, 4)} if full else {}
        yield row | figures | share | {"rounds": rounds - (rounds > 1)}
    for name, error in failed.items():
        yield {"batch": batch, "contestant": name, "error": error}
    stand, hit, alone = (
        median(times, *pair) for pair in (("plan", "skipped"), (ALL_REUSED, "skipped"), (HEADS, "computed"))
    )
    if full and stand:
        yield goal(f"plan, skipped step, batch {batch}", 100 * stand / full, 0.2, "% of a full step")
    if hit and alone:
        value = 100 * (hit / alone - 1)
        yield goal(f"h2cache, both stages reused, batch {batch}", value, 3.0, "% over its two blocks alone")
    computed = median(times, ALL_COMPUTED, "computed")
    if full and computed:
        value, note = 100 * (computed / full - 1), "checks, and learning the residuals"
        yield goal(f"h2cache, computed step, batch {batch}", value, 1.0, "% over a full step", note)


def checks(ctx: Context, batch: int, times: Times) -> Iterator[dict]:
    """The two checks of the paper's rule alone, with their waits."""
    model, (tokens, text), config = ctx.flux(), ctx.tokens, H2Config()
    width = model.config.num_attention_heads * model.config.attention_head_dim
    make = {"device": ctx.device, "dtype": ctx.dtype}
    image, joint = (torch.randn(batch, n, width, **make) for n in (tokens, tokens + text))
    references = [pooled_summary(x, p) * 1.1 for x, p in ((image, config.pool1), (joint, config.pool2))]
    seconds: list[float] = []
    with torch.inference_mode():
        for _ in range(23):
            with ctx.timed(seconds):
                for x, pool, known in zip(
                    (image, joint), (config.pool1, config.pool2), references, strict=True
                ):
                    relative_l1(known, pooled_summary(x, pool)).tolist()
    figures, full = spread(seconds[3:]), median(times, UNCACHED, "computed")
    yield {"batch": batch, "contestant": "both checks alone", "step": "checks"} | figures
    if full:
        value = 100 * figures["ms, median"] / full
        yield goal(f"h2cache, both checks, batch {batch}", value, 1.0, "% of a full step")
