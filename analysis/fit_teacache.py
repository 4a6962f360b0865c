"""Fit TeaCache's polynomial to a model: the output's change as a function of the input's.

    python -m analysis.fit_teacache                            # embedded model, 32 prompts, 50 steps
    python -m analysis.fit_teacache --model black-forest-labs/FLUX.1-dev --prompts my.jsonl --save

Runs without a cache. At every step from the second, the relative L1 change of the first block's modulated
input and that of the whole stack's residual (image tokens), both against the step before, give one point; a
polynomial of degree 4 is fitted to all points by least squares (arXiv 2411.19108). --save puts it, with its
source and the range of changes seen, into baselines/constants/teacache.json under the model's name; the
points are kept in --out.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from analysis import keep
from analysis.prompts import read_prompts
from analysis.runs import Limits, call_arguments, default_device, draw, load_pipeline
from h2cache.api import checkpoint_name
from h2cache.method import Method, MethodConfig
from h2cache.similarity import relative_l1
from h2cache.stages import Look, Run

if TYPE_CHECKING:
    from h2cache.memory import Memory
    from h2cache.stages import Program, Span

CONSTANTS = Path("baselines/constants/teacache.json")


@dataclass(frozen=True)
class WatchConfig(MethodConfig):
    """Uncached, noting (step, change of the modulated input, change of the residual) in `points`."""

    name = "watch"
    requires = frozenset({"modulated input"})

    points: list[tuple[int, float, float]] = field(default_factory=list)

    def build(self) -> Watch:
        return Watch(self)


class Watch(Method):
    """Runs every block."""

    config: WatchConfig
    last: tuple[Tensor, Tensor] | None = None

    def step(self, stages: tuple[Span, ...], memory: Memory) -> Program:
        modulated = yield Look()
        ran = yield Run(range(stages[-1].last))
        now = (modulated, ran.residual.img)
        if memory.step > 0:
            changes = [
                relative_l1(a, b, per_sample=False).item() for a, b in zip(self.last, now, strict=True)
            ]
            self.config.points.append((memory.step, *changes))
        self.last = now
        for stage in stages:
            memory.record(stage, None, None, "miss")


def fit(points: np.ndarray) -> dict:
    """The polynomial through `points` (N, 2), highest power first, with its quality and range."""
    change, wanted = points.T
    coefficients = np.polyfit(change, wanted, 4)
    error = wanted - np.polyval(coefficients, change)
    low, high = change.min(), change.max()
    lowest = np.polyval(coefficients, np.linspace(low, high, 1000)).min()
    return {
        "coefficients": [float(c) for c in coefficients],
        "fitted_range": [float(low), float(high)],
        "r_squared": float(1 - error.var() / wanted.var()),
        "lowest_value_in_range": float(lowest),
        "points": len(points),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="assets/tiny_flux")
    parser.add_argument("--prompts", type=Path, default=Path("assets/prompts/tiny32.jsonl"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--out", type=Path, default=Path("outputs/teacache"))
    parser.add_argument("--save", action="store_true", help=f"write the result into {CONSTANTS}")
    args = parser.parse_args()
    if args.steps < 3:
        parser.error(f"--steps {args.steps}: two changes at least are needed, that is three steps")
    try:
        result = measure(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=1))
    if result["lowest_value_in_range"] < 0:
        print(
            "warning: the polynomial is negative inside the range of changes: use clamp=true", file=sys.stderr
        )
    return 0


def measure(args: argparse.Namespace) -> dict:
    """Run the prompts, keep the points in --out, and fit."""
    limits = Limits.of(args.model)
    torch.set_num_threads(limits.cpu_threads or torch.get_num_threads())
    pipeline = load_pipeline(args.model, args.device, args.dtype)
    pipeline.set_progress_bar_config(disable=True)
    call = call_arguments(pipeline, limits, None, None, args.guidance) | {"num_inference_steps": args.steps}
    watched = []
    for prompt in tqdm(read_prompts(args.prompts), unit="prompt"):
        config = WatchConfig()
        draw(pipeline, config, args.seed if prompt.seed is None else prompt.seed, prompt=prompt.text, **call)
        watched += [(prompt.id, *point) for point in config.points]
    args.out.mkdir(parents=True, exist_ok=True)
    lines = ["id,step,input_change,output_change", *(",".join(map(str, row)) for row in watched)]
    keep.write_atomically(args.out / "points.csv", ("\n".join(lines) + "\n").encode())
    result = fit(np.array([row[2:] for row in watched]))
    result["source"] = (
        f"python -m analysis.fit_teacache {' '.join(sys.argv[1:])}".strip()
        + f", {args.steps} steps, {keep.machine()['device_name']}, {keep.now()[:10]}"
    )
    if args.save:
        table = json.loads(CONSTANTS.read_text(encoding="utf-8"))
        table[checkpoint_name(pipeline)] = result
        keep.write_atomically(CONSTANTS, (json.dumps(table, indent=1) + "\n").encode())
    return result


if __name__ == "__main__":
    sys.exit(main())
