"""Which method runs on which model family: tries every pair, and writes the table.

    python -m analysis.family_table                 # every method on every family, a minute on one core
    python -m analysis.family_table --table         # prints what assets/results/families.json holds

Each pair is a whole call of the family's real pipeline class with tiny random weights, so a cell says that
the method works there, not how good its pictures are; "measured" marks pairs for which a preset was measured.
Exit code 1 if a pair fails in any other way than by a refusal.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import diffusers
import transformers

from analysis.cli import guarded, shipped
from analysis.measures.families import FAILED, trial
from analysis.options import Parser
from analysis.records import store
from analysis.records.compare import as_table
from analysis.records.provenance import provenance
from analysis.settings import config_of
from analysis.tiny_families import FAMILIES
from h2cache import method_names

SHIPPED = Path(shipped("assets/results"))
VARIANTS = (  # what is proposed where a method is refused
    "taylorseer:granularity=stage",
    "taylorseer_lite:lite_at=hidden",
    "hicache:granularity=stage",
    "speca:granularity=stage",
)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    methods = [*method_names(), *VARIANTS]
    parser.add_argument("--methods", nargs="+", default=methods, metavar="METHOD[:KEY=VALUE...]")
    parser.add_argument("--out", type=Path, help=f"default: {SHIPPED}, for the whole table only")
    parser.add_argument("--table", action="store_true", help="try nothing, print what is there")
    args = parser.parse_args(argv)
    for method in args.methods:
        try:
            config_of(method)
        except ValueError as error:
            parser.error(str(error))
    whole = args.families == list(FAMILIES) and args.methods == methods
    if args.out is None and not (whole or args.table):
        parser.error(f"a part of the table would replace the whole one in {SHIPPED}: give --out DIR")
    args.out = args.out or SHIPPED
    return args


def table(report: dict) -> str:
    """The report as Markdown, with the reasons of refusals below."""
    methods = report["methods"]
    rows = []
    reasons: dict[str, int] = {}
    for family, row in report["families"].items():
        cells = []
        for method in methods:
            cell = row["methods"][method]
            note = ""
            if "reason" in cell:
                note = f" [{reasons.setdefault(cell['reason'], len(reasons) + 1)}]"
            cells.append(cell["outcome"] + note)
        rows.append([family, row["pipeline"], *cells])
    lines = as_table(["family", "pipeline", *methods], rows)
    lines += ["", *(f"[{number}] {reason}  " for reason, number in reasons.items())] if reasons else []
    machine = report["machine"]["device_name"]
    lines += ["", f"Made by `{report['command']}`, {machine}, {report['date']}."]
    return "\n".join(lines) + "\n"


def run(args: argparse.Namespace, argv: list[str] | None) -> int:
    path = args.out / "families.json"
    if args.table:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: make it with --out {args.out}")
        print(table(json.loads(path.read_text(encoding="utf-8"))))
        return 0
    for library in (transformers, diffusers):
        library.logging.set_verbosity_error()  # the tiny models are odd in ways that do not matter
    args.out.mkdir(parents=True, exist_ok=True)
    rows = trial(args.families, args.methods)
    report = provenance("family_table", "cpu", argv) | {"methods": args.methods, "families": rows}
    store.write_atomically(path, json.dumps(report, indent=1).encode())
    store.write_atomically(args.out / "families.md", table(report).encode())
    print(table(report))
    return int(any(c["outcome"] == FAILED for row in rows.values() for c in row["methods"].values()))


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    return guarded(lambda: run(args, argv), "nothing is written")


if __name__ == "__main__":
    raise SystemExit(main())
