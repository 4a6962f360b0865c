"""The measurements behind `analysis.pfs`: what a check costs, how steady it is, what it decides.

Each writes one `.jsonl` of its own into a folder. The cost is measured on tensors of FLUX.1-dev's real
shapes, the rest on a model that draws.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, median

import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import Tensor

import h2cache
from analysis.ablations.summaries import COMPARED, FULL, ProbeConfig, Summary, SummaryConfig
from analysis.cli import progress
from analysis.drawing.draw import Drawn, check_device, synchronise
from analysis.drawing.prompts import Prompt
from analysis.measures.fidelity import fidelity
from analysis.measuring import Trial, measure, recorded
from analysis.records import store
from h2cache import MethodConfig, find_method
from h2cache.similarity import magnitude, relative_l1

IMG, TXT, WIDTH, HEADS, BLOCKS = 4096, 512, 3072, 24, 57  # FLUX.1-dev at 1024x1024
REFERENCE_GAP = 3  # steps between a check and its reference: between 2 and 5 in the runs of the presets
NOISES, DRAWS = (0.02, 0.1), 4  # noise on the latents, relative to their standard deviation
# Thresholds on full tensors whose hit counts every summary must meet. In the first two a detail check follows
# a structure miss and nearly always misses too: only structure is compared. In the third, detail decides.
TARGETS = ((0.12, 0.02), (0.35, 0.2), (0.06, 0.2))
TUNING, HALVINGS = 6, 5  # prompts that the thresholds are tuned on; bisection steps for each
OWN_HITS = 1.0  # a threshold is tuned where full tensors hit at least so often a request, forced hits apart
PARTS = ("cost", "steadiness", "decisions")


# What a check costs.


def timed(action: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls after one untimed; on the CPU of this thread alone, so that other
    programs do not count."""
    action()
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    found = []
    for _ in range(repeats):
        synchronise(device)
        start = clock()
        action()
        synchronise(device)
        found.append(clock() - start)
    return found


def check_costs(device: str, dtype: str | None, repeats: int = 15) -> Iterator[dict]:
    """One row for each summary and stage at FLUX.1-dev's shapes, after one for a transformer block."""
    torch.set_num_threads(1)
    where = torch.device(device)
    kind = getattr(torch, dtype or ("float32" if where.type == "cpu" else "bfloat16"))
    shared = {"device": where.type, "dtype": str(kind), "clock": "thread" if where.type == "cpu" else "wall"}
    with torch.inference_mode():
        yield {"key": "block", "part": "block", **shared, "seconds": _block_seconds(where, kind)}
        generator = torch.Generator(where).manual_seed(0)
        for stage, tokens in (("structure", IMG), ("detail", TXT + IMG)):
            old = torch.randn(1, tokens, WIDTH, device=where, generator=generator).to(kind)
            new = old + 0.1 * torch.randn(1, tokens, WIDTH, device=where, generator=generator).to(kind)
            for summary in COMPARED:
                reference = summary.of(old, stage).contiguous()
                scale = magnitude(reference)

                def once(
                    summary=summary, stage=stage, reference=reference, scale=scale, new=new
                ) -> list[float]:
                    return relative_l1(reference, summary.of(new, stage), scale=scale).tolist()

                yield {
                    "key": f"check {stage} {summary}", "part": "check", "stage": stage,
                    "summary": str(summary), **shared, "seconds": timed(once, where, repeats),
                    "bytes": reference.nbytes,
                }  # fmt: skip


def _block_seconds(device: torch.device, dtype: torch.dtype) -> list[float]:
    """One single-stream block: double-stream ones cost as much, 57 of them make a step."""
    with torch.device(device):
        block = FluxSingleTransformerBlock(WIDTH, HEADS, WIDTH // HEADS).to(dtype).eval()
        img, txt = torch.randn(1, IMG, WIDTH).to(dtype), torch.randn(1, TXT, WIDTH).to(dtype)
        temb, rope = torch.randn(1, WIDTH).to(dtype), torch.ones(IMG + TXT, WIDTH // HEADS)
    action = lambda: block(img, txt, temb, image_rotary_emb=(rope, rope))  # noqa: E731
    return timed(action, device, 2 if device.type == "cpu" else 10)


# How steady the measure is.


def steadiness(trial: Trial, prompts: list[Prompt]) -> Iterator[dict]:
    """A row for each prompt, stage and summary: the measure at every step, clean and under noise.

    clean: at each step from REFERENCE_GAP on, against the residual REFERENCE_GAP steps before.
    noisy: as clean, with noise on the transformer's latents, DRAWS times for each of NOISES.
    """
    for prompt in progress(prompts, "prompt", "steadiness"):
        clean, noisy = residuals(trial, prompt)
        for stage in clean:
            for summary in COMPARED:
                short = [summary.of(r, stage) for r in clean[stage]]
                pairs = list(zip(short, short[REFERENCE_GAP:], strict=False))
                row = {
                    "key": f"{prompt.id} {stage} {summary}", "id": prompt.id, "stage": stage,
                    "summary": str(summary), "clean": [_change(a, b) for a, b in pairs],
                }  # fmt: skip
                shaken = zip(short, noisy[stage][REFERENCE_GAP:], strict=False)
                changes = [[_change(old, summary.of(n[None], stage)) for n in new] for old, new in shaken]
                per_level = {
                    str(s): [c[i * DRAWS : (i + 1) * DRAWS] for c in changes] for i, s in enumerate(NOISES)
                }
                yield row | {"noisy": per_level}


def _change(old: Tensor, new: Tensor) -> float:
    return float(f"{relative_l1(old, new).item():.4g}")


def residuals(trial: Trial, prompt: Prompt) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """By stage, for every step of an uncached run: the residual (1, tokens, C), and those under noise."""
    transformer = trial.pipeline.transformer
    calls, clean, noisy = [], {}, {}
    hook = transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    try:
        trial.draw(prompt, ProbeConfig(lambda stage, r: clean.setdefault(stage, []).append(r.clone())))
    finally:
        hook.remove()
    h2cache.enable(transformer, ProbeConfig(lambda stage, r: noisy.setdefault(stage, []).append(r.clone())))
    generator, copies = torch.Generator("cpu").manual_seed(0), len(NOISES) * DRAWS
    try:
        with torch.inference_mode():
            for kwargs in calls:
                latents = kwargs["hidden_states"].repeat(copies, 1, 1)
                sizes = torch.tensor(NOISES).repeat_interleave(DRAWS).view(-1, 1, 1) * latents[0].std().cpu()
                noise = torch.randn(latents.shape, generator=generator) * sizes
                many = dict(kwargs)
                for name, value in kwargs.items():
                    if torch.is_tensor(value) and not name.endswith("_ids"):
                        many[name] = value.repeat(copies, *[1] * (value.ndim - 1))
                many["hidden_states"] = latents + noise.to(latents)
                with transformer.cache_context("noisy"):
                    transformer(**many)
    finally:
        h2cache.disable(transformer)
    return clean, noisy


# What it decides, at the same hit counts.


def decisions(trial: Trial, ratios: dict[tuple[str, str], float], path: Path) -> None:
    """Into `path`, a row for each target, summary and prompt that was not tuned on.

    ratios: (stage, summary) to the typical ratio of its measure to that of full tensors, to start from. A
    threshold with too few hits of its own to be tuned by (OWN_HITS) stays at that ratio.
    """
    tuning, others = trial.prompts[:TUNING], trial.prompts[TUNING:]
    contestants: dict[str, MethodConfig] = {}
    known: dict[str, dict] = {}  # of each contestant's rows
    for target in TARGETS:
        wanted = _hits(trial, tuning, SummaryConfig(*target))
        for summary in progress(COMPARED, "measure", f"thresholds like {target[0]}/{target[1]}"):
            taus = list(target)
            if summary != FULL:
                taus = [t * ratios[s, str(summary)] for t, s in zip(target, wanted, strict=True)]
                for n, stage in enumerate(wanted):
                    if wanted[stage] >= OWN_HITS:
                        taus[n] = _tuned(trial, tuning, summary, taus, n, stage, wanted[stage])
            contestants[name := f"{target} {summary}"] = SummaryConfig(*taus, summary)
            known[name] = {
                "target": list(target), "summary": str(summary), "tau1": taus[0], "tau2": taus[1],
                "tuned_hits": _hits(trial, tuning, contestants[name]), "wanted_hits": wanted,
            }  # fmt: skip

    def rows(prompt: Prompt, drawn: dict[str, Drawn]) -> dict[str, dict]:
        uncached = trial.draw(prompt, find_method("none")())
        costs = ("hits", "steps", "blocks_run", "blocks")
        return {
            name: known[name] | {cost: getattr(found.summary, cost) for cost in costs}
            | fidelity(found.image, uncached.image)
            for name, found in drawn.items()
        }  # fmt: skip

    def key(prompt: Prompt, name: str) -> str:
        return trial.key(prompt, repr(contestants[name]))

    measure(path, others, contestants, trial.draw, rows, key)


def _hits(trial: Trial, prompts: list[Prompt], config: SummaryConfig) -> dict[str, float]:
    """Mean hits a request that a stage's own check gave, by stage; no picture is decoded.

    Forced hits do not count: they say nothing of the threshold of the stage that is forced.
    """
    traces = [trial.draw(p, config, output_type="latent").trace for p in prompts]
    stages = dict.fromkeys(record["stage"] for record in traces[0])
    return {
        stage: fmean(sum(r["stage"] == stage and r["outcome"] == "hit" for r in trace) for trace in traces)
        for stage in stages
    }


def _tuned(
    trial: Trial,
    prompts: list[Prompt],
    summary: Summary,
    taus: list[float],
    n: int,
    stage: str,
    wanted: float,
) -> float:
    """The n-th threshold for which `stage` hits as often as wanted, by bisection on a logarithmic scale."""
    low, high = taus[n] / 3, taus[n] * 3
    best = (float("inf"), taus[n])
    for _ in range(HALVINGS + 1):
        middle = (low * high) ** 0.5
        tried = [middle if i == n else t for i, t in enumerate(taus)]
        hits = _hits(trial, prompts, SummaryConfig(*tried, summary))[stage]
        best = min(best, (abs(hits - wanted), middle))
        if hits == wanted:
            break
        low, high = (middle, high) if hits < wanted else (low, middle)
    return best[1]


@recorded("pfs")
def run(args: argparse.Namespace) -> Path:
    """The measurements in `args.parts`, into --out; decisions without steadiness start from that in --out."""
    trial = None if args.parts == ["cost"] else Trial.of(args)
    if trial and len(trial.prompts) <= TUNING:
        raise ValueError(f"{TUNING} prompts are tuned on and others drawn: give more than {TUNING}")
    if "cost" in args.parts:
        check_device(args.device)
        threads = torch.get_num_threads()
        _write(args.out / "cost.jsonl", check_costs(args.device, args.dtype))
        torch.set_num_threads(threads)
    if trial is None:
        return args.out
    path = args.out / "steadiness.jsonl"
    if "steadiness" in args.parts:
        steady = _write(path, steadiness(trial, trial.prompts[:TUNING]))
    else:
        steady = list(store.read_records(path).values())
        if not steady:
            raise ValueError(f"decisions start from the steadiness of the measures, and {path} has none")
    if "decisions" in args.parts:
        decisions(trial, typical_ratios(steady), args.out / "decisions.jsonl")
    return args.out


def typical_ratios(rows: list[dict]) -> dict[tuple[str, str], float]:
    """(stage, summary) to the median ratio of its measure to that of full tensors at the same step."""
    full = {(r["id"], r["stage"]): r["clean"] for r in rows if r["summary"] == str(FULL)}
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        base = full.get((row["id"], row["stage"]), [])
        ratios = [a / b for a, b in zip(row["clean"], base, strict=False) if b > 0]
        found.setdefault((row["stage"], row["summary"]), []).extend(ratios)
    return {name: median(values) for name, values in found.items() if values}


def _write(path: Path, rows: Iterator[dict]) -> list[dict]:
    """Keep the rows as they come: what an interrupted run has measured is written too."""
    found: dict[str, dict] = {}
    try:
        for row in rows:
            found[row["key"]] = row
    finally:
        if found:
            store.write_records(path, found)
    return list(found.values())
