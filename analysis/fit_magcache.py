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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev

import torch

from analysis.ablations.fitting import Seen, WatchConfig, fit_script, parser_of, save_constants, source, watch
from analysis.cli import shipped, warn
from analysis.measuring import Trial
from h2cache.memory import Memory

CONSTANTS = Path(shipped("baselines/constants/magcache.json"))


@dataclass(frozen=True)
class Ratios(WatchConfig):
    """Notes (branch, step, ratio of the residual's norms, its deviation over tokens, cosine distance)."""

    def point(self, memory: Memory, before: Seen, now: Seen) -> tuple:
        last, new = before[1].float(), now[1].float()
        ratio = new.norm(dim=-1) / (last.norm(dim=-1) + 1e-8)
        distance = 1 - torch.cosine_similarity(new, last, dim=-1)
        return memory.branch, memory.step, ratio.mean().item(), ratio.std().item(), distance.mean().item()


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


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> None:
    """Run the prompts and take the means; save them if asked."""
    trial = Trial.of(args)
    result = fit([point[1:] for point in watch(trial, Ratios)])
    result |= source("fit_magcache", args, argv, f"{len(trial.prompts)} prompts")
    if args.save:
        save_constants(CONSTANTS, trial, result)
    print(json.dumps(result))
    if "averaged_branches" in result:
        warn(f"the table is the mean of the branches {', '.join(result['averaged_branches'])}")


def main(argv: list[str] | None = None) -> int:
    return fit_script(parser_of(__doc__, CONSTANTS, limit=8), argv, run)


if __name__ == "__main__":
    sys.exit(main())
