"""Is every method, switched off, the uncached model bit for bit; and does `disable` bring it back?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

import h2cache
from analysis.cli import TINY
from analysis.drawing.draw import load_pipeline
from analysis.drawing.families import takes
from analysis.gpu_report.context import Context, goal
from analysis.gpu_report.models import OFF, SKIPPING, settings
from analysis.tiny_families import FAMILIES

STEPS = 5  # the fewest in which the plan skips any
ONE_OF_EACH_ENGINE = ("flux", "flux2", "qwen_image", "sd3", "wan", "hunyuan_video", "z_image", "dit")
SIGN = {
    "prompt": 'a red round sign that says "CAFE" on a striped green background',
    "height": 128, "width": 128, "max_sequence_length": 24,
}  # fmt: skip


def drawn(pipeline: DiffusionPipeline, call: dict[str, Any]) -> np.ndarray:
    """What a call gives, in floating point and not in 256 shades."""
    exact = {"output_type": "np"} if takes(pipeline, "output_type") else {}
    generator = torch.Generator().manual_seed(0)
    output = pipeline(**call | exact, num_inference_steps=STEPS, generator=generator)
    return np.asarray(output.images if hasattr(output, "images") else output.frames, dtype=np.float32)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.array_equal(a, b, equal_nan=True))


def compare(pipeline: DiffusionPipeline, call: dict[str, Any]) -> Iterator[dict]:
    """One row for each method, and what the uncached model does twice."""
    right = drawn(pipeline, call)
    again = same(right, drawn(pipeline, call))
    yield {
        "method": "uncached twice", "equal": again, "finite": bool(np.isfinite(right).all()),
        "note": "" if again else "its kernels are not deterministic: the rows below prove nothing",
    }  # fmt: skip
    for method in SKIPPING:
        try:
            h2cache.enable(pipeline, settings(method, **OFF))
        except ValueError as error:
            yield {"method": method, "equal": None, "note": f"refused: {error}"[:160]}
            continue
        try:
            row: dict[str, Any] = {"method": method, "equal": same(right, drawn(pipeline, call))}
        except Exception as error:
            refused = isinstance(error, ValueError) and method in str(error)
            row = {"method": method, "equal": None if refused else False}
            row["note"] = f"{'refused' if refused else type(error).__name__}: {error}"[:160]
        finally:
            h2cache.disable(pipeline)
        yield row
    yield {"method": "after disable", "equal": same(right, drawn(pipeline, call))}


def exact(ctx: Context) -> Iterator[dict]:
    """The embedded model, then a random one of every engine, in float32 and bfloat16."""
    cases = [("embedded", dtype) for dtype in ("float32", "bfloat16")]
    cases += [(name, dtype) for dtype in ("bfloat16", "float32") for name in ONE_OF_EACH_ENGINE]
    rows, left_out = [], []
    for name, dtype in [("embedded", "float32"), ("flux", "bfloat16")] if ctx.small else cases:
        if ctx.left < 6:
            left_out.append(f"{name} in {dtype}")
            continue
        try:
            if name == "embedded":
                pipeline, call = load_pipeline(TINY, ctx.device, dtype), SIGN
                pipeline.set_progress_bar_config(disable=True)
            else:
                pipeline, call = FAMILIES[name]()
                pipeline.to(ctx.device, getattr(torch, dtype))
            for row in compare(pipeline, call):
                rows.append({"model": name, "dtype": dtype} | row)
                yield rows[-1]
        except Exception as error:
            yield {"model": name, "dtype": dtype, "method": "-", "equal": None} | {
                "note": f"does not run uncached: {type(error).__name__}: {error}"[:200]
            }
    tried = [row for row in rows if row["equal"] is not None]
    wrong = [f"{r['model']} {r['dtype']} {r['method']}" for r in tried if not r["equal"]]
    left = f"; no time for {', '.join(left_out)}" if left_out else ""
    detail = (", ".join(wrong) or f"{len(tried)} comparisons") + left
    yield goal("pictures unlike the uncached one with methods switched off", len(wrong), 0, "", detail)
