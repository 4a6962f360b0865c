"""Find the best evaluated steps of the plan, or a method's thresholds, for a model, by drawing and comparing.

    python -m analysis.tune                                          # the embedded model at 50 steps
    python -m analysis.tune --steps 28 --speedups 2 3 4
    python -m analysis.tune --model black-forest-labs/FLUX.1-dev --prompts my.txt --limit 4 --held-out 8
    python -m analysis.tune --method h2cache --speedups 4            # tau1 and tau2 for 4x
    python -m analysis.tune --processes 4 --model ...                # one process for each of 4 GPUs
    torchrun --nproc-per-node 4 -m analysis.tune --model ...         # the same, and on many machines

The first --limit prompts are searched on, the --held-out after them only measured. A plan is kept in the
user's cache folder, where `h2cache.enable(pipe, speedup=5)` and `run.py --speedup 5` find it; --save FILE
writes it elsewhere. A search that was stopped goes on where it was; Ctrl-C keeps the best so far.
Processes share the prompts of a trial, so more of them than prompts are idle. They find what one alone does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import h2cache
from analysis.cli import add_measuring_arguments, guarded, size_of, start
from analysis.drawing.families import with_prompt
from analysis.drawing.prompts import read_prompts
from analysis.options import Parser, at_least_one, positive, whole
from analysis.sharing import is_first, is_one_of_many, joined, launch, own_device
from h2cache import method_names
from h2cache.tuned import Tuned


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_measuring_arguments(parser)
    parser.add_argument("--method", default="plan", choices=method_names(), help="default: %(default)s")
    parser.add_argument("--speedups", type=positive, nargs="+", default=[2, 3, 4, 5, 6, 8])
    parser.add_argument("--limit", type=at_least_one, default=8, help="prompts to search on (default: 8)")
    parser.add_argument("--held-out", type=whole(0), default=8, help="prompts to measure on (default: 8)")
    parser.add_argument(
        "--trials", type=at_least_one, help="most plans to try for a speed (default: no limit)"
    )
    parser.add_argument("--save", type=Path, help="file to write (default: in the user's cache folder)")
    parser.add_argument("--processes", type=at_least_one, default=1, help="of this machine, sharing prompts")
    parser.set_defaults(device=own_device())
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    group = joined()
    prompts = read_prompts(args.prompts)[: args.limit + args.held_out]
    pipeline, _, call, _ = start(args, prompts if is_first() else ())
    asked = [
        with_prompt(pipeline, {"prompt": p.text}) | {"seed": args.seed if p.seed is None else p.seed}
        for p in prompts
    ]
    if is_first():
        print(
            f"{args.model}: {size_of(call) or 'its own size'}, {args.steps} steps, {len(asked)} prompts",
            flush=True,
        )
    for speedup in [None] if args.method == "plan" else args.speedups:
        found = h2cache.tune(
            pipeline,
            asked[: args.limit],
            held_out=asked[args.limit :],
            speedups=args.speedups,
            method=args.method,
            speedup=speedup,
            trials=args.trials,
            save=args.save,
            group=group,
            **call,
        )
        if not is_first():
            continue
        if not isinstance(found, Tuned):
            print(f"{found.speedup:.2f}x: {found.config}, PSNR {found.quality.mean:.1f} dB")
            continue
        print(f"{'evaluations':>12} {'speed-up':>9} {'PSNR':>6} {'held out':>9} {'worst':>6}  steps")
        for plan in found.plans:
            held = plan.held_out or plan.tuning
            print(
                f"{plan.evaluations:>12} {found.steps / plan.evaluations:>8.2f}x {plan.tuning.mean:>6.1f} "
                f"{held.mean:>9.1f} {held.worst:>6.1f}  {' '.join(map(str, plan.steps))}"
            )


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.processes > 1 and not is_one_of_many():
        return launch(["-m", "analysis.tune", *(sys.argv[1:] if argv is None else argv)], args.processes)
    return guarded(lambda: run(args), "the best so far is kept, and the same command goes on from there")


if __name__ == "__main__":
    sys.exit(main())
