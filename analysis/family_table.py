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
import re
from dataclasses import fields, replace
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline

import h2cache
from analysis.cli import command_of, guarded, progress, shipped
from analysis.options import Parser
from analysis.records import store
from analysis.records.compare import as_table
from analysis.settings import parse_settings
from analysis.tiny_families import FAMILIES
from h2cache import MethodConfig, find_method, method_names
from h2cache.presets import PRESETS

STEPS = 5
SHIPPED = Path(shipped("assets/results"))
RUNS, FIT, REFUSED, FAILED, MEASURED = "runs", "runs, once fitted", "refused", "FAILED", "measured"
CHECKPOINTS = {"flux": "tiny_flux"}  # of which family our measured checkpoints are
STAND_IN = {  # for constants fitted to a checkpoint
    "coefficients": (0.0, 0.0, 0.0, 1.0, 0.0),
    "ratios": (1.0, 1.0, 1.0),
    "times": (0.5,),
    "by_latents": (1.0,),
    "by_time": (1.0,),
}
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
            settings_of(method)
        except ValueError as error:
            parser.error(str(error))
    whole = args.families == list(FAMILIES) and args.methods == methods
    if args.out is None and not (whole or args.table):
        parser.error(f"a part of the table would replace the whole one in {SHIPPED}: give --out DIR")
    args.out = args.out or SHIPPED
    return args


def settings_of(text: str) -> MethodConfig:
    """The settings that `METHOD[:KEY=VALUE...]` names."""
    name, *settings = text.split(":")
    kind = find_method(name)
    return kind(**parse_settings(kind, settings))


def outcome(pipeline: DiffusionPipeline, call: dict, config: MethodConfig) -> tuple[str, str]:
    """What becomes of one call under the method of `config`, and the reason where it does not run."""
    stand_ins = {f.name: STAND_IN[f.name] for f in fields(config) if f.name in STAND_IN}
    for settings, good in ((config, RUNS), (replace(config, **stand_ins), FIT)):
        try:
            h2cache.enable(pipeline, settings)
        except (ValueError, MemoryError) as error:
            reason = str(error)
            continue
        try:
            pipeline(**call, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
            return (good, "") if h2cache.step_records(pipeline) else (FAILED, "no step was recorded")
        except MemoryError as error:  # reckoned before the first block
            reason = str(error)
        except Exception as error:  # a refusal names its method; what else is wrong with a call is a fault
            if not (isinstance(error, ValueError) and re.search(rf"\b{settings.name}\b", str(error))):
                return FAILED, f"{type(error).__name__}: {error}"
            reason = str(error)
        finally:
            h2cache.disable(pipeline)
    return REFUSED, reason


def measured(family: str, method: str) -> bool:
    """Whether a preset of `method` was measured by us on a checkpoint of `family`."""
    ours = [p for p in PRESETS.values() if p.ours and p.model == CHECKPOINTS.get(family)]
    return any(p.config.name == method for p in ours)


def trial(families: list[str], methods: list[str]) -> dict[str, dict]:
    """Family by family: the pipeline class, its transformer, and the outcome under each method."""
    rows = {}
    for family in progress(families, "model"):
        pipeline, call = FAMILIES[family]()
        cells = {}
        for method in methods:
            found, reason = outcome(pipeline, call, settings_of(method))
            found = MEASURED if found in (RUNS, FIT) and measured(family, method) else found
            reason = re.sub(r"; the engine of .* cannot give that", ", which its engine cannot give", reason)
            cells[method] = {"outcome": found} | ({"reason": reason} if reason else {})
        rows[family] = {
            "pipeline": type(pipeline).__name__,
            "transformer": type(pipeline.transformer).__name__,
            "methods": cells,
        }
    return rows


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


def run(args: argparse.Namespace, command: str) -> int:
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
    report = {
        "command": command,
        "machine": store.machine("cpu"),
        "date": store.now(),
        "methods": args.methods,
        "families": rows,
    }
    store.write_atomically(path, json.dumps(report, indent=1).encode())
    store.write_atomically(args.out / "families.md", table(report).encode())
    print(table(report))
    return int(any(c["outcome"] == FAILED for row in rows.values() for c in row["methods"].values()))


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    return guarded(lambda: run(args, command_of("family_table", argv)), "nothing is written")


if __name__ == "__main__":
    raise SystemExit(main())
