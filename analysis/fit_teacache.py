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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis.ablations import fitting
from analysis.ablations.fitting import Seen, fit_script, parser_of, save_constants, source, watch
from analysis.cli import shipped, warn
from analysis.measuring import Trial
from analysis.records import store
from h2cache.memory import Memory
from h2cache.similarity import relative_l1

CONSTANTS = Path(shipped("baselines/constants/teacache.json"))


@dataclass(frozen=True)
class WatchConfig(fitting.WatchConfig):
    """Notes (step, change of the modulated input, change of the residual)."""

    requires = frozenset({"modulated input"})

    def point(self, memory: Memory, before: Seen, now: Seen) -> tuple:
        pairs = zip(before, now, strict=True)
        return memory.step, *(relative_l1(a, b, per_sample=False).item() for a, b in pairs)


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


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> None:
    """Run the prompts, keep the points in --out, and fit."""
    trial = Trial.of(args)
    args.out.mkdir(parents=True, exist_ok=True)
    points = watch(trial, WatchConfig)
    lines = ["id,step,input_change,output_change", *(",".join(map(str, row)) for row in points)]
    store.write_atomically(args.out / "points.csv", ("\n".join(lines) + "\n").encode())
    result = fit(np.array([row[2:] for row in points])) | source("fit_teacache", args, argv)
    if args.save:
        save_constants(CONSTANTS, trial, result)
    print(json.dumps(result, indent=1))
    if result["lowest_value_in_range"] < 0:
        warn("the polynomial is negative inside the range of changes: use clamp=true")


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__, CONSTANTS, limit=None)
    parser.add_argument("--out", type=Path, default=Path("outputs/teacache"))
    return fit_script(parser, argv, run, least=3)


if __name__ == "__main__":
    sys.exit(main())
