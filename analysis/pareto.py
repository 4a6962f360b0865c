"""Quality against compute for every method: blocks, seconds and bytes of cache, with fewer steps as control.

    python -m analysis.pareto                        # from the shipped records: 80 prompts, every method
    python -m analysis.pareto --records DIR/rows.jsonl --metric words_read
    python -m analysis.pareto --run --prompts assets/prompts/cute80_tiny.jsonl      # an hour on one core
    python -m analysis.pareto --run --methods h2cache:tau1=0.2,0.4:tau2=0.2 fewer_steps:factor=2,4 --limit 12

One figure for each metric of quality that was measured (or --metric): three panels of our own runs, means
over prompts with 95 % bootstrap intervals, and what others have published in a panel of its own, hollow. A
method that lies below the line of fewer steps loses against simply taking fewer steps. Settings that are
words make a line of their own, settings that are numbers the points on it.

Writes pareto_METRIC.png/.pdf/.csv and the comparison in pareto.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from analysis import experiment
from analysis.cli import figure_script, shipped
from analysis.figures import style
from analysis.figures.pareto import answer, draw
from analysis.measuring import parser_of
from analysis.records.compare import METRICS, points
from analysis.records.provenance import command_of, source_of
from analysis.records.published import PUBLISHED, published
from analysis.records.saved import MAYBE, NUMBER, Saved, read_saved

SHIPPED = Path(shipped("assets/results/methods/rows.jsonl.gz"))
PAIRS = ((0.05, 0.02), (0.06, 0.02), (0.12, 0.02), (0.2, 0.05), (0.35, 0.2), (0.5, 0.3))  # tau1, tau2
CONTESTANTS = [  # every method, from 2 to 6 times fewer blocks on the embedded model
    "fewer_steps:factor=2,3,4,5,6",
    "block_cache:threshold=0.05,0.1,0.15,0.2,0.3",
    "teacache:threshold=0.035,0.06,0.09,0.13,0.18",
    "magcache:threshold=0.05,0.15,0.4,0.8,2:max_consecutive_hits=9:retention=0.04",
    "taylorseer:order=2:interval=2,3,4,6,8",
    "taylorseer_lite:order=2:interval=2,3,4,6,8",
    "hicache:sigma=0.7:interval=2,3,4,6,8",
    "clusca:order=2:exact_fresh=true:interval=2,3,4,6,8",
    *(
        f"speca:base={base}:decay=1:floor=0:min_drafts=1:max_drafts={most}"
        for base, most in ((7, 1), (0.02, 2), (0.1, 6), (0.2, 8), (0.5, 9), (7, 9))
    ),
    "seacache:max_consecutive_hits=99:threshold=0.12,0.25,0.4,0.6",
    "easycache:warmup_steps=3:threshold=0.01,0.025,0.05,0.1",
    "meancache:budget=25,17,13,10,8",
    "spectrum:growth=0,0.3,0.75,3",
    "budcache:budget=25,17,13,10,8",
    "dicache:retention=0.04:threshold=0.1,0.2,0.4,0.8",
    "sencache:early_threshold=0.05:threshold=0.1,0.3,0.6,1",
    *(f"h2cache:tau1={a}:tau2={b}" for a, b in PAIRS),
    *(f"h2cache:tau1={a}:tau2={b}:predictor=taylor" for a, b in PAIRS),
    *(f"h2cache:tau1={a}:tau2={b}:predictor=dmd" for a, b in PAIRS),
    "plan:speedup=2,3,4,5,6,7,8",
    "plan:file=none:speedup=2,3,4,5,6,7,8",
]
NEEDS = {
    "key": str, "id": str, "label": str, "method": str, "seconds": NUMBER, "blocks_run": int, "blocks": int,
    "steps_recorded": int, "bytes_held": int, "psnr": MAYBE, "ssim": MAYBE, "gmsd": MAYBE,
    "words_read": MAYBE, "clip_iqa": MAYBE,
}  # fmt: skip
SAME = {"blocks in a step": lambda row: row["blocks"] / max(1, row["steps_recorded"])}
EXPERIMENT = {"clip": None, "no_words": False, "processes": 1}  # as it is run from here


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "pareto")
    parser.add_argument("--records", type=Path, default=SHIPPED, help="rows.jsonl of `analysis.experiment`")
    parser.add_argument("--metric", nargs="+", choices=list(METRICS), help="default: all that were measured")
    parser.add_argument("--methods", nargs="+", default=CONTESTANTS, help="of the run, as in the experiment")
    parser.set_defaults(prompts=None, **EXPERIMENT)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> tuple[Path, int]:
    """The experiment with many settings of each method: its rows, and 1 where some pictures failed."""
    return args.out / "rows.jsonl", experiment.run(args, command_of("pareto"))


def read(path: Path) -> Saved:
    """Rows of an experiment; those of a prompt without its uncached picture are left out."""
    saved = read_saved([path], NEEDS, same=SAME, unique=("label", "key"))
    saved.keep_with_uncached(path)
    if not any(row["method"] != "none" for row in saved.rows):
        saved.exit_code()
        raise ValueError(f"{path} holds no cached picture with its uncached one")
    return saved


@figure_script
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    path, code = run(args) if args.run else (args.records, 0)
    saved = read(path)
    cached = [r for r in saved.rows if r["method"] != "none"]
    metrics = args.metric or [m for m in METRICS if any(r[m] is not None for r in cached)]
    measured = {metric: points(saved.rows, metric) for metric in metrics}
    for metric, found in measured.items():
        if not any(p["method"] != "none" for p in found):
            raise ValueError(f"{metric} was not measured in {path}")
        draw(found, metric, published(PUBLISHED), args.out / f"pareto_{metric}")
    style.write_words(args.out / "pareto.md", answer(measured, source_of(path.parent)))
    return max(code, saved.exit_code())


if __name__ == "__main__":
    sys.exit(main())
