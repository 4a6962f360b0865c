"""Measure MagCache's ratios on a model: how much the network's residual grows or shrinks at each step.

    python -m analysis.fit_magcache                            # embedded model, 8 prompts, 50 steps
    python -m analysis.fit_magcache --model black-forest-labs/FLUX.1-dev --prompts my.jsonl --save

Runs without a cache. At every step from the second, the mean over tokens of ||r_t|| / ||r_t-1||, r the
residual of all blocks (image tokens; arXiv 2506.09045). The authors use one prompt; here the mean over
prompts, with their spread, and the spread over tokens and cosine distance that say whether the assumption
holds. --save puts the result, with its source, into baselines/constants/magcache.json under the model's name.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, pstdev

import torch
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
from analysis.options import Parser, at_least_one
from analysis.records import store
from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig
from h2cache.program import Program, Run, Stage

CONSTANTS = Path(shipped("baselines/constants/magcache.json"))


@dataclass(frozen=True)
class WatchConfig(MethodConfig):
    """Uncached, noting (branch, step, ratio, its deviation over tokens, cosine distance) in `points`."""

    name = "watch"

    points: list[tuple[str, int, float, float, float]] = field(default_factory=list)

    def build(self) -> Watch:
        return Watch(self)


class Watch(Method):
    """Runs every block."""

    config: WatchConfig

    def __init__(self, config: WatchConfig) -> None:
        super().__init__(config)
        self.last: dict[str, Tensor] = {}

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        ran = yield Run(range(stages[-1].last))
        now = ran.residual.img.float()
        if memory.step > 0:
            before = self.last[memory.branch]
            ratio = now.norm(dim=-1) / (before.norm(dim=-1) + 1e-8)
            distance = 1 - torch.cosine_similarity(now, before, dim=-1)
            found = (ratio.mean().item(), ratio.std().item(), distance.mean().item())
            self.config.points.append((memory.branch, memory.step, *found))
        self.last[memory.branch] = now
        for stage in stages:
            memory.record(stage, None, None, "miss")


def fit(points: list[tuple[str, int, float, float, float]]) -> dict:
    """The mean ratio of each step and branch, the first 1 by convention; and how steady they are.

    MagCache has a table for the branch named "uncond" and one for all others: those are averaged, and named
    under `averaged_branches`.
    """
    others = [p for p in points if p[0] != "uncond"]
    branches = {"ratios": others}
    if uncond := [p for p in points if p[0] == "uncond"]:
        branches["ratios_uncond"] = uncond
    result: dict = {}
    for name, rows in branches.items():
        steps = sorted({row[1] for row in rows})
        result[name] = [1.0, *(round(fmean(r[2] for r in rows if r[1] == step), 5) for step in steps)]
    if len(names := sorted({p[0] for p in others})) > 1:
        result["averaged_branches"] = names
    over_prompts: dict[tuple[str, int], list[float]] = {}
    for branch, step, ratio, *_ in points:
        over_prompts.setdefault((branch, step), []).append(ratio)
    result["largest_deviation_over_prompts"] = round(max(map(pstdev, over_prompts.values())), 5)
    result["mean_deviation_over_tokens"] = round(fmean(p[3] for p in points), 5)
    result["mean_cosine_distance"] = round(fmean(p[4] for p in points), 5)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    add_measuring_arguments(parser)
    parser.add_argument("--limit", type=at_least_one, default=8, help="number of prompts")
    parser.add_argument("--save", action="store_true", help=f"write the result into {CONSTANTS}")
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error(f"--steps {args.steps}: two steps at least are needed")
    return guarded(lambda: measure(args, command_of("fit_magcache", argv)), "nothing is saved")


def measure(args: argparse.Namespace, command: str) -> None:
    """Run the prompts and take the means; save them if asked."""
    prompts = read_prompts(args.prompts)[: args.limit]
    pipeline, _, call, _ = start(args, prompts)
    points = []
    for prompt in progress(prompts, "prompt"):
        config = WatchConfig()
        draw(pipeline, config, args.seed if prompt.seed is None else prompt.seed, prompt=prompt.text, **call)
        points += config.points
    result = fit(points)
    machine = store.machine(args.device)["device_name"]
    result["source"] = f"{command}, {args.steps} steps, {len(prompts)} prompts, {machine}, {store.now()[:10]}"
    if args.save:
        save_constants(CONSTANTS, pipeline, result)
    print(json.dumps(result))
    if "averaged_branches" in result:
        warn(f"the table is the mean of the branches {', '.join(result['averaged_branches'])}")


if __name__ == "__main__":
    sys.exit(main())
