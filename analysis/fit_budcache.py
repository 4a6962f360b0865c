"""BudCache's search on a model: which steps are best computed, for a number of them.

    python -m analysis.fit_budcache --budgets 10                     # embedded model, 2 prompts, 50 steps
    python -m analysis.fit_budcache --model FOLDER --prompts my.jsonl --budgets 17 10 --trials 300 --save

The authors' annealing and descent (arXiv 2606.13496), with their loss: the squared error of the finished
latents against the uncached ones, here the mean over prompts. They take up to 200 proposals and 20 rounds of
descent; --trials ends it earlier. --save puts the result, with its source, into
baselines/constants/budcache.json under the model's name. Ctrl-C keeps the best.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from h2cache.baselines.budcache import BudCacheConfig, Steps, search
from tqdm import tqdm

from analysis.ablations.fitting import fit_script, parser_of, save_constants, source
from analysis.cli import shipped
from analysis.measuring import Trial
from analysis.options import at_least_one
from h2cache import MethodConfig, find_method

CONSTANTS = Path(shipped("baselines/constants/budcache.json"))


class Enough(Exception):
    """All trials are used up."""


def latents(trial: Trial, config: MethodConfig) -> tuple[torch.Tensor, int]:
    """The finished latents of all prompts, and how many evaluations a picture takes."""
    drawn = [trial.draw(prompt, config, output_type="latent") for prompt in trial.prompts]
    return torch.stack([torch.as_tensor(d.image).float() for d in drawn]), drawn[0].summary.steps


def find(
    trial: Trial, right: torch.Tensor, total: int, budget: int, trials: int, seed: int
) -> tuple[Steps, float, int]:
    """The best `budget` of `total` steps in so many trials, their loss, and how many trials it took.

    right: the uncached latents.
    """
    asked = 0

    def loss(steps: Steps) -> float:
        nonlocal asked
        if asked == trials:
            raise Enough
        asked += 1
        bar.update()
        return float((latents(trial, BudCacheConfig(steps=steps))[0] - right).square().mean())

    best, least = tuple(range(budget)), math.inf
    bar = tqdm(total=trials, unit="trial", desc=f"{budget} steps", disable=None)
    try:
        for found in search(loss, total, budget, random.Random(seed)):
            best, least = found
            bar.set_postfix_str(f"{least:.3g}")
    except (Enough, KeyboardInterrupt):
        if not asked:
            raise
    finally:
        bar.close()
    return best, least, asked


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> None:
    """Search for each budget, and save what was found if asked."""
    trial = Trial.of(args)
    right, total = latents(trial, find_method("none")())
    if too_many := [b for b in args.budgets if b >= total]:
        raise ValueError(f"--budgets {too_many[0]}: of {total} steps, fewer must be computed")
    found = {budget: find(trial, right, total, budget, args.trials, args.seed) for budget in args.budgets}
    losses = ", ".join(f"{b} steps: {loss:.3g} after {n} trials" for b, (_, loss, n) in found.items())
    result = source("fit_budcache", args, argv, f"{len(trial.prompts)} prompts; squared error, {losses}")
    result |= {"steps": total, "computed": {str(b): list(best) for b, (best, *_) in found.items()}}
    if args.save:
        save_constants(CONSTANTS, trial, result)
    print(json.dumps(result))


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__, CONSTANTS, limit=2)
    parser.add_argument("--budgets", type=at_least_one, nargs="+", default=[10], help="default: 10")
    parser.add_argument("--trials", type=at_least_one, default=220, help="of each budget (default: 220)")
    return fit_script(parser, argv, run)


if __name__ == "__main__":
    sys.exit(main())
