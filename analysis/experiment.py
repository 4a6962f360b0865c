"""The paper's experiment: every method draws the same prompts with the same seeds, and a table compares them.

    python -m analysis.experiment                                    # embedded model, its measured presets
    python -m analysis.experiment --limit 12 --methods none block_cache:threshold=0.1,0.2 h2cache:tau1=0.3,0.4
    python -m analysis.experiment --model black-forest-labs/FLUX.1-dev --prompts assets/prompts/cute80.jsonl
    python -m analysis.experiment --processes 4 --model ...         # one process for each of 4 GPUs
    torchrun --nproc-per-node 4 -m analysis.experiment --model ...  # the same; on many machines give --out a
                                                                    # folder that all of them see

A contestant is METHOD or METHOD:KEY=VALUE[,VALUE...][:KEY=...], where several values make several, or the
name of a preset. A method without settings is the model's measured preset. Contestants take turns prompt by
prompt, each prompt in another order, so that a machine that drifts is fair. `seconds` is the whole pipeline
call, `seconds_steps` the denoising alone.

Pictures and rows are kept in --out/runs/ID, where ID stands for model, steps, size, guidance, seed, device,
dtype and number of processes: another setting is another folder. A run that was stopped, however, goes on
where it ended. The table goes to --out: table.md, table.csv, table.json, rows.jsonl, compare.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from analysis.cli import add_model_arguments, guarded
from analysis.drawing.contest import Experiment
from analysis.drawing.load import add_loading_arguments
from analysis.options import Parser, at_least_one
from analysis.records.provenance import command_of
from analysis.sharing import is_one_of_many, launch
from analysis.table import write_tables

PAPER = ("none", "block_cache", "teacache", "h2cache", "fewer_steps")  # the paper's four and the control
OURS = ("plan", "plan:file=none")  # the plan, tuned and by its default grid


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_arguments(parser, None)
    parser.add_argument("--limit", type=at_least_one, help="only the first N prompts")
    parser.add_argument("--methods", nargs="+", metavar="METHOD[:KEY=VALUE...]")
    add_loading_arguments(parser, None)  # one accelerator for each process
    parser.add_argument("--clip", help="CLIP for CLIP-IQA: folder or hub id (default: the hub's cache)")
    parser.add_argument("--no-words", action="store_true", help="do not read the words back (OCR)")
    parser.add_argument("--processes", type=at_least_one, default=1, help="of this machine, sharing the work")
    parser.add_argument("--out", type=Path, default=Path("outputs/experiment"))
    args = parser.parse_args(argv)
    args.methods = args.methods or [*PAPER, *OURS]
    return args


# Contestants.


# The three phases.


def run(args: argparse.Namespace, command: str) -> int:
    state = PartialState(cpu=not torch.accelerator.is_available())
    if is_one_of_many() and state.num_processes == 1:
        raise ValueError("WORLD_SIZE is above 1 but this process is alone: start it with torchrun")
    experiment = Experiment(args, state)
    if state.is_main_process:
        labels = ", ".join(c.label for c in experiment.contestants)
        print(f"{len(experiment.prompts)} prompts by {labels}, kept in {experiment.folder}")
        experiment.warn()
    experiment.prepare()
    failed = experiment.draw()  # returns when all processes are done
    experiment.score()
    if state.is_main_process:
        rows = experiment.rows()
        print(write_tables(args.out, experiment.folder / "images", rows, experiment.settings, command))
        print(f"table.md, table.csv, table.json, rows.jsonl and compare.png are in {args.out}/")
    if failed:
        print(f"{failed} pictures could not be drawn: the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    command = command_of("experiment", argv)
    if args.processes > 1 and not is_one_of_many():
        return launch(
            ["-m", "analysis.experiment", *(sys.argv[1:] if argv is None else argv)], args.processes
        )
    return guarded(
        lambda: run(args, command), f"the same command goes on; what is finished is in {args.out}/"
    )


if __name__ == "__main__":
    sys.exit(main())
