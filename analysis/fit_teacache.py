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

import numpy as np
from torch import Tensor

from analysis.cli import (
    add_measuring_arguments,
    command_of,
    guarded,
    progress,
    save_constants,
    shipped,
    start,
    warn,
)
from analysis.drawing.draw import draw
from analysis.drawing.prompts import read_prompts
from analysis.options import Parser
from analysis.records import store
from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig
from h2cache.program import Look, Program, Run, Stage
from h2cache.similarity import relative_l1

CONSTANTS = Path(shipped("baselines/constants/teacache.json"))


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

    def __init__(self, config: WatchConfig) -> None:
        super().__init__(config)
        self.last: dict[str, tuple[Tensor, Tensor]] = {}  # by guidance branch

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        modulated = yield Look()
        ran = yield Run(range(stages[-1].last))
        now = (modulated, ran.residual.img)
        if memory.step > 0:
            pairs = zip(self.last[memory.branch], now, strict=True)
            changes = [relative_l1(a, b, per_sample=False).item() for a, b in pairs]
            self.config.points.append((memory.step, *changes))
        self.last[memory.branch] = now
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


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    add_measuring_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("outputs/teacache"))
    parser.add_argument("--save", action="store_true", help=f"write the result into {CONSTANTS}")
    args = parser.parse_args(argv)
    if args.steps < 3:
        parser.error(f"--steps {args.steps}: two changes at least are needed, that is three steps")
    return guarded(lambda: measure(args, command_of("fit_teacache", argv)), "nothing is saved")


def measure(args: argparse.Namespace, command: str) -> None:
    """Run the prompts, keep the points in --out, and fit."""
    prompts = read_prompts(args.prompts)
    args.out.mkdir(parents=True, exist_ok=True)
    pipeline, _, call, _ = start(args, prompts)
    watched = []
    for prompt in progress(prompts, "prompt"):
        config = WatchConfig()
        draw(pipeline, config, args.seed if prompt.seed is None else prompt.seed, prompt=prompt.text, **call)
        watched += [(prompt.id, *point) for point in config.points]
    lines = ["id,step,input_change,output_change", *(",".join(map(str, row)) for row in watched)]
    store.write_atomically(args.out / "points.csv", ("\n".join(lines) + "\n").encode())
    result = fit(np.array([row[2:] for row in watched]))
    machine = store.machine(args.device)["device_name"]
    result["source"] = f"{command}, {args.steps} steps, {machine}, {store.now()[:10]}"
    if args.save:
        save_constants(CONSTANTS, pipeline, result)
    print(json.dumps(result, indent=1))
    if result["lowest_value_in_range"] < 0:
        warn("the polynomial is negative inside the range of changes: use clamp=true")


if __name__ == "__main__":
    sys.exit(main())
