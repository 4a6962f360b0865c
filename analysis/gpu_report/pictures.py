"""Whole pictures of the embedded model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

import numpy as np
import torch

import h2cache
from analysis.cli import TINY
from analysis.drawing.draw import load_pipeline
from analysis.gpu_report.context import Context
from analysis.gpu_report.exact import SIGN
from h2cache import PlanConfig
from h2cache.presets import PRESETS


def pictures(ctx: Context) -> Iterator[dict]:
    """Seconds of a picture, uncached, with the paper's rule and with the plan, in turn."""
    pipeline = load_pipeline(TINY, ctx.device, None)
    pipeline.set_progress_bar_config(disable=True)
    steps, rounds = (10, 2) if ctx.small else (50, 8)
    contestants = {"uncached": None, "h2cache, preset": PRESETS["tiny_flux-4x"].config, "plan": PlanConfig()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    drawn: dict[str, np.ndarray] = {}
    for turn in range(rounds + 1):
        if turn > 1 and ctx.left < 3 * sum(map(max, seconds.values())):
            break
        for name, config in contestants.items():
            h2cache.disable(pipeline) if config is None else h2cache.enable(pipeline, config)
            generator = torch.Generator().manual_seed(7)
            with ctx.timed(seconds[name]):
                output = pipeline(**SIGN, num_inference_steps=steps, generator=generator, output_type="np")
            drawn[name] = output.images
            if not turn:  # it warms up
                seconds[name].clear()
    h2cache.disable(pipeline)
    first = statistics.median(seconds["uncached"])
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        error = float(np.square(drawn[name].astype(np.float64) - drawn["uncached"]).mean())
        yield {
            "contestant": name, "steps": steps, "s / picture, median": round(middle, 4),
            "fastest": round(min(taken), 4), "slowest": round(max(taken), 4), "repeats": len(taken),
            "times faster": round(first / middle, 2),
            "PSNR to uncached, dB": round(-10 * math.log10(error), 2) if error else "identical",
            "note": "128x128, whole call, 1.9 M weights: on a GPU its kernels are shorter than their launch",
        }  # fmt: skip
