"""Every method on three small models, and which claim holds on which.

    python -m analysis.three_models                              # from the shipped records
    python -m analysis.experiment --model assets/tiny_wan ... --out RUN      # the command is in about.json
    python -m analysis.three_models --collect RUN --model tiny_wan

    python -m analysis.three_models --collect RUN --model tiny_wan --beside tuned   # drawn afterwards

`--collect` checks the pictures of an experiment by the model's own measure and keeps its rows. Of videos PSNR
is the mean over frames, and flicker the mean error of the change from frame to frame, in levels of 8 bits.

A method's value at a ratio of blocks is that of the setting within 3 % of it; else it lies, picture by
picture, on the line between its two nearest settings. Intervals are 95 % bootstrap over pictures; of a
comparison, of paired differences.
"""

from __future__ import annotations

import sys
from pathlib import Path

from analysis.cli import guarded
from analysis.figures.models import claims_table, methods_table, right_table, samplers_table, steps_tables
from analysis.options import Parser
from analysis.records import store
from analysis.records.models import FURTHER, RECORDS, collect, frozen_rows, read, sampler_rows


def write(out: Path) -> int:
    """three_models.md in `out`; 1 where a record was left out, else 0."""
    saved = {model: read(model) for model in RECORDS}
    models = {model: found.rows for model, found in saved.items()}
    lines = ["# Three models", "", *claims_table(models, {m: frozen_rows(m) for m in models})]
    for model, rows in models.items():
        pictures = {m: len({r["id"] for r in rows if r["method"] == m}) for m in ("none", "plan")}
        lines += ["", f"## {model}: {pictures['none']} pictures, {pictures['plan']} by the plan", ""]
        lines += methods_table(model, rows)
    if rows := sampler_rows():
        pictures = len({row["id"] for row in rows})
        lines += ["", f"## tiny_flux under other samplers: {pictures} pictures, PSNR in dB", ""]
        lines += [*samplers_table(rows), "", *right_table(rows)]
    lines += ["", "## Few steps, uncached", *steps_tables(), ""]
    out.mkdir(parents=True, exist_ok=True)
    store.write_atomically(out / "three_models.md", "\n".join(lines).encode())
    return max([found.exit_code() for found in saved.values()])  # a list: all of them tell


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--collect", type=Path, nargs="+", metavar="RUN", help="--out of experiments")
    parser.add_argument("--model", choices=RECORDS, help="of --collect")
    parser.add_argument("--beside", choices=FURTHER, help="--collect into a file of its own")
    parser.add_argument("--out", type=Path, default=Path("outputs/three_models"))
    args = parser.parse_args(argv)
    if bool(args.collect) != bool(args.model):
        parser.error("--collect and --model go together")
    if args.beside and not args.collect:
        parser.error("--beside goes with --collect")
    if args.model == "tiny_flux" and not args.beside:
        parser.error("--model tiny_flux: its records are those of analysis.pareto, add to them with --beside")
    if args.collect:
        return guarded(lambda: collect(args.collect, args.model, args.beside), "nothing")
    return guarded(lambda: write(args.out), "nothing")


if __name__ == "__main__":
    sys.exit(main())
