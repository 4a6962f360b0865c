"""The measure of every step and stage against its threshold, with hits, forced hits and misses.

    python -m analysis.trace                                         # from the shipped records
    python -m analysis.trace --records DIR/rows.jsonl --label "h2cache tau1=0.2 tau2=0.05"
    python -m analysis.trace --records outputs/records.jsonl --id sign03   # of run.py
    python -m analysis.trace --run --tau1 0.2 --tau2 0.05 --limit 8
    python -m analysis.trace --run --method plan --set speedup=5 --limit 8     # its steps, and its own errors

One request (--id, else the first) and all requests together: the median measure with bands that hold half
and nine tenths of them, and the share of hits at every step. A forced hit has no measure: the structure stage
hit, so the detail stage did not look; nor has the first step, which has nothing to compare with. Both are
drawn in a strip below the measures. Requests of other settings than the first are left out: --label chooses.

Writes trace.png/.pdf/.csv, trace_all.png/.pdf/.csv and the counts in trace.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from analysis.cli import figure_script, shipped
from analysis.drawing.draw import Drawn
from analysis.drawing.prompts import Prompt
from analysis.figures import style
from analysis.figures.trace import answer, draw_all, draw_one
from analysis.measuring import Trial, measure, parser_of, recorded
from analysis.options import number
from analysis.records import store
from analysis.records.provenance import source_of
from analysis.records.traces import read
from analysis.settings import parse_settings
from h2cache import H2Config, find_method

SHIPPED = Path(shipped("assets/results/tiny_flux_traces/rows.jsonl.gz"))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "trace")
    parser.add_argument(
        "--records", type=Path, default=SHIPPED, help="rows.jsonl or records.jsonl with traces"
    )
    parser.add_argument("--method", default="h2cache", help="default: %(default)s")
    parser.add_argument(
        "--label", help='contestant, or settings as "tau1=0.1 tau2=0.05" (default: the first of the method)'
    )
    parser.add_argument("--id", help="request that is drawn alone (default: the first)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the run")
    parser.add_argument("--tau1", type=number, default=0.2, help="of the run")
    parser.add_argument("--tau2", type=number, default=0.05, help="of the run")
    return parser.parse_args(argv)


@recorded("trace")
def run(args: argparse.Namespace) -> Path:
    """Draw every prompt once with the method; the pictures are not kept. A stopped run goes on."""
    kind = find_method(args.method)
    taus = {"tau1": args.tau1, "tau2": args.tau2} if kind is H2Config else {}
    config = kind(**taus | parse_settings(kind, args.set))
    trial, path = Trial.of(args), args.out / "rows.jsonl"
    known = {"method": config.name, "config": store.settings_of(config)}

    def rows(_: Prompt, drawn: dict[str, Drawn]) -> dict[str, dict]:
        return {name: known | {"trace": store.compact(found.trace)} for name, found in drawn.items()}

    measure(path, trial.prompts, {repr(config): config}, trial.draw, rows, trial.key)
    return path


@figure_script
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    path = run(args) if args.run else args.records
    saved, label = read(path, args.method, args.label)
    one = next((row for row in saved.rows if args.id in (None, row["id"])), None)
    if one is None:
        raise ValueError(f"{path} holds no request {args.id!r} of {label}")
    draw_one(one, args.out / "trace")
    draw_all(saved.rows, args.out / "trace_all")
    style.write_words(args.out / "trace.md", answer(saved.rows, label, source_of(path.parent)))
    return saved.exit_code()


if __name__ == "__main__":
    sys.exit(main())
