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
from h2cache.stages import Run

if TYPE_CHECKING:
    from h2cache.memory import Memory
    from h2cache.stages import Program, Span

CONSTANTS = Path("baselines/constants/magcache.json")


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

    def step(self, stages: tuple[Span, ...], memory: Memory) -> Program:
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
    """The mean ratio of each step and branch, the first 1 by convention; and how steady they are."""
    branches = {"ratios": [p for p in points if p[0] != "uncond"]}
    if uncond := [p for p in points if p[0] == "uncond"]:
        branches["ratios_uncond"] = uncond
    result: dict = {}
    for name, rows in branches.items():
        steps = sorted({row[1] for row in rows})
        of = {step: np.array([row[2:] for row in rows if row[1] == step]) for step in steps}
        result[name] = [1.0, *(round(float(of[step][:, 0].mean()), 5) for step in steps)]
    spread = [float(of[step][:, 0].std()) for step in steps]
    result["largest_deviation_over_prompts"] = round(max(spread), 5)
    result["mean_deviation_over_tokens"] = round(float(np.mean([p[3] for p in points])), 5)
    result["mean_cosine_distance"] = round(float(np.mean([p[4] for p in points])), 5)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="assets/tiny_flux")
    parser.add_argument("--prompts", type=Path, default=Path("assets/prompts/tiny32.jsonl"))
    parser.add_argument("--limit", type=int, default=8, help="number of prompts")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--save", action="store_true", help=f"write the result into {CONSTANTS}")
    args = parser.parse_args()
    if args.steps < 2 or args.limit < 1:
        parser.error(
            f"--steps {args.steps} --limit {args.limit}: two steps and one prompt at least are needed"
        )
    try:
        result = measure(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


def measure(args: argparse.Namespace) -> dict:
    """Run the prompts and take the means; save them if asked."""
    limits = Limits.of(args.model)
    torch.set_num_threads(limits.cpu_threads or torch.get_num_threads())
    pipeline = load_pipeline(args.model, args.device, args.dtype)
    pipeline.set_progress_bar_config(disable=True)
    call = call_arguments(pipeline, limits, None, None, args.guidance) | {"num_inference_steps": args.steps}
    points = []
    for prompt in tqdm(read_prompts(args.prompts)[: args.limit], unit="prompt"):
        config = WatchConfig()
        draw(pipeline, config, args.seed if prompt.seed is None else prompt.seed, prompt=prompt.text, **call)
        points += config.points
    result = fit(points)
    result["source"] = (
        f"python -m analysis.fit_magcache {' '.join(sys.argv[1:])}".strip()
        + f", {args.steps} steps, {args.limit} prompts, {keep.machine()['device_name']}, {keep.now()[:10]}"
    )
    if args.save:
        table = json.loads(CONSTANTS.read_text(encoding="utf-8"))
        table[checkpoint_name(pipeline)] = result
        rows = [f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in table.items()]
        keep.write_atomically(CONSTANTS, ("{\n" + ",\n".join(rows) + "\n}\n").encode())
    return result


if __name__ == "__main__":
    sys.exit(main())
