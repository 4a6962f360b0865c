"""Measure SenCache's table on a model: how far the output moves with the latents and with the time.

    python -m analysis.fit_sencache                            # embedded model, 4 prompts, 50 steps
    python -m analysis.fit_sencache --model black-forest-labs/FLUX.1-dev --prompts my.jsonl --save

Runs without a cache, and evaluates the model twice more at each step (arXiv 2602.24208, the authors'
`sensitivity_calculation.py`): with the latents of the next step, |f(x', t) - f(x, t)| / |x' - x|, and at its
time, |f(x, t') - f(x, t)| / |t' - t|. The branch with the prompt counts. The authors take videos with noise
added, here they are the model's own. Sizes are root mean squares; the table is the mean over prompts. --save
puts it, with its source, into baselines/constants/sencache.json under the model's name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from analysis.ablations.fitting import fit_script, parser_of, save_constants, source
from analysis.cli import progress, shipped
from analysis.measuring import Trial
from h2cache import find_method
from h2cache.api import denoisers_of
from h2cache.engines.whole import TIMES
from h2cache.schedule import TRAINED

CONSTANTS = Path(shipped("baselines/constants/sencache.json"))
LATENTS = ("hidden_states", "x")
Call = tuple[tuple, dict[str, Any]]


class Watch:
    """Notes the first call of a model at each step: that of the branch with the prompt."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Call]] = []

    def __call__(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        time = float(torch.as_tensor(_given(kwargs, TIMES)).reshape(-1)[-1])
        if self.calls and self.calls[-1][0] == time:
            return
        self.calls.append((time, (args, kwargs)))


def _given(kwargs: dict[str, Any], names: tuple[str, ...]) -> Any:
    found = [kwargs[name] for name in names if name in kwargs]
    if not found:
        raise ValueError(f"of {', '.join(names)} this model's call has no keyword, only {', '.join(kwargs)}")
    return found[0]


def sensitivity(model: torch.nn.Module, calls: list[tuple[float, Call]]) -> list[tuple[float, float, float]]:
    """(time in [0, 1], by the latents, by the time) of each step but the last."""
    unit, rows = TRAINED if max(time for time, _ in calls) > 1 else 1.0, []
    for (now, (args, kwargs)), (after, (args2, kwargs2)) in pairwise(calls):
        name = next((n for n in LATENTS if n in kwargs), None)
        latents = kwargs[name] if name else args[0]
        later = kwargs2[name] if name else args2[0]
        moved = (args, kwargs | {name: later}) if name else ((later, *args[1:]), kwargs)
        waited = (args, kwargs | {n: kwargs2[n] for n in TIMES if n in kwargs})
        here, there, then = (_output(model, call) for call in ((args, kwargs), moved, waited))
        by_latents = _size(there - here) / _size(_tensor(later) - _tensor(latents))
        rows.append((now / unit, by_latents, _size(then - here) / abs((after - now) / unit)))
    return rows


@torch.no_grad()
def _output(model: torch.nn.Module, call: Call) -> Tensor:
    out = model(*call[0], **call[1])
    return _tensor(out[0] if isinstance(out, tuple) else out.sample)


def _tensor(value: Any) -> Tensor:
    return torch.stack(value) if isinstance(value, list) else value


def _size(values: Tensor) -> float:
    return values.float().square().mean().sqrt().item()


def fit(runs: list[list[tuple[float, float, float]]]) -> dict:
    """The mean over runs, by step."""
    steps = [zip(*step, strict=True) for step in zip(*runs, strict=True)]
    rows = [[round(fmean(column), 6) for column in step] for step in steps]
    return {key: [row[n] for row in rows] for n, key in enumerate(("times", "by_latents", "by_time"))}


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> None:
    """Run the prompts and take the means; save them if asked."""
    trial = Trial.of(args)
    (model,) = denoisers_of(trial.pipeline)
    runs = []
    for prompt in progress(trial.prompts, "prompt"):
        watch = Watch()
        hook = model.register_forward_pre_hook(watch, with_kwargs=True)
        trial.draw(prompt, find_method("none")())
        hook.remove()
        runs.append(sensitivity(model, watch.calls))
    result = fit(runs) | source("fit_sencache", args, argv, f"{len(trial.prompts)} prompts")
    if args.save:
        save_constants(CONSTANTS, trial, result)
    print(json.dumps(result))


def main(argv: list[str] | None = None) -> int:
    return fit_script(parser_of(__doc__, CONSTANTS, limit=4), argv, run)


if __name__ == "__main__":
    sys.exit(main())
