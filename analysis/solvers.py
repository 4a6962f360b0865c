"""The plan against solvers at the same number of evaluations, and against the converged picture too.

    python -m analysis.solvers                     # from the shipped records
    python -m analysis.solvers --run --limit 16    # the embedded model; some minutes on one core

The plan is a predictor and corrector on a subset of the sampler's own steps, so its rivals are not only
caches: plainly fewer Euler steps, DPM++ 2M and UniPC with as many evaluations. Two references: the uncached
picture of --steps Euler steps, which a cache is to reproduce, and that of --converged steps, nearer to the
true solution. Values are PSNR of float pictures, means over prompts with 95 % bootstrap intervals.

Writes solvers.png/.pdf/.csv and solvers.md.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import h2cache
from analysis.cli import figure_script, shipped
from analysis.drawing.prompts import Prompt
from analysis.drawing.samplers import other_sampler
from analysis.figures import style
from analysis.figures.solvers import REFERENCES, answer, draw_figure
from analysis.measuring import Trial, measure, parser_of, recorded
from analysis.options import at_least_one
from analysis.records.provenance import source_of
from analysis.records.saved import NUMBER, read_saved
from h2cache import PlanConfig
from h2cache.studio import psnr

SHIPPED = Path(shipped("assets/results/tiny_flux_solvers/rows.jsonl"))
COUNTS = (5, 7, 10, 12, 15, 20, 25)
NEEDS = {"key": str, "id": str, "solver": str, "evaluations": int, **dict.fromkeys(REFERENCES, NUMBER)}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "solvers")
    parser.add_argument("--records", type=Path, default=SHIPPED)
    parser.add_argument("--converged", type=at_least_one, default=400, help="steps of the second reference")
    return parser.parse_args(argv)


def solvers(pipeline: Any, count: int, steps: int) -> Iterator[tuple[str, Any, PlanConfig | None, int]]:
    """Each contestant with `count` evaluations: name, scheduler, plan, and the steps to ask for."""
    euler = pipeline.scheduler
    yield "plan", euler, PlanConfig(evaluations=count), steps
    yield "plan, default grid", euler, PlanConfig(evaluations=count, file="none"), steps
    yield "plan, ode", euler, PlanConfig(evaluations=count, file="none", target="ode"), steps
    yield "euler", euler, None, count
    yield "dpm++ 2m", other_sampler(pipeline, "dpm++"), None, count
    yield "unipc", other_sampler(pipeline, "unipc"), None, count


@recorded("solvers")
def run(args: argparse.Namespace) -> Path:
    """Draw every prompt with every solver; the pictures are not kept. A stopped run goes on."""
    trial, path = Trial.of(args), args.out / "rows.jsonl"
    pipeline, own = trial.pipeline, copy.deepcopy(trial.pipeline.scheduler)
    trial.settings["converged"] = args.converged

    def draw(prompt: Prompt, contestant: tuple[Any, PlanConfig | None, int]) -> np.ndarray:
        pipeline.scheduler, plan, steps = contestant
        h2cache.disable(pipeline) if plan is None else h2cache.enable(pipeline, plan)
        generator = torch.Generator().manual_seed(trial.seed_of(prompt))
        given = trial.call | {"num_inference_steps": steps, "generator": generator, "output_type": "np"}
        return pipeline(prompt.text, **given).images[0]

    def rows(prompt: Prompt, drawn: dict[str, np.ndarray]) -> dict[str, dict]:
        references = [draw(prompt, (own, None, steps)) for steps in (args.steps, args.converged)]
        distance, found = psnr(*references), {}
        for told, picture in drawn.items():
            name, _, count = told.rpartition(" ")
            values = dict(zip(REFERENCES, (psnr(picture, r) for r in references), strict=True))
            found[told] = {"solver": name, "evaluations": int(count), **values, "references": distance}
        return found

    every = [(count, *solver) for count in COUNTS for solver in solvers(pipeline, count, args.steps)]
    contestants = {f"{name} {count}": tuple(solver) for count, name, *solver in every}
    measure(path, trial.prompts, contestants, draw, rows, trial.key)
    return path


@figure_script
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    path = run(args) if args.run else args.records
    saved = read_saved([path], NEEDS, unique=("key",))
    draw_figure(saved.rows, args.out / "solvers")
    style.write_words(args.out / "solvers.md", answer(saved.rows, source_of(path.parent)))
    return saved.exit_code()


if __name__ == "__main__":
    sys.exit(main())
