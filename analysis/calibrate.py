"""Measure H2-Cache's thresholds on a model: the whole (tau1, tau2) plane, and the best pair for a speed-up.

    python -m analysis.calibrate                     # embedded model, 32 prompts, 50 steps
    python -m analysis.calibrate --table --out assets/results/tiny_flux_presets
    python -m analysis.calibrate --model black-forest-labs/FLUX.1-dev --steps 50 --prompts my.jsonl

Every pair draws the same prompts with the same seeds; contestants take turns prompt by prompt, so that a
machine that drifts is fair. After each prompt the rows are written (records.jsonl): a killed run goes on.
The best pair for a speed-up S is the one of highest mean PSNR among those with at least S times fewer blocks.
--shard I/N does every N-th prompt only, for N processes that share --out. A table is of one setting (model,
steps, size, guidance, seed, dtype, ...): what --out holds of others is left to a table of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from analysis.cli import TINY_PROMPTS, add_model_arguments, guarded, shard
from analysis.drawing.contestants import configurations
from analysis.drawing.draw import Drawn, default_device
from analysis.drawing.load import add_loading_arguments
from analysis.drawing.prompts import Prompt, read_prompts
from analysis.measures import words
from analysis.measures.fidelity import ClipIqa, fidelity
from analysis.measuring import Trial, measure
from analysis.options import Parser, at_least_one, number
from analysis.records import store
from analysis.records.planes import best, by_setting, read, show, table, tables
from analysis.records.provenance import provenance
from h2cache import find_method

WANTED = (2.0, 3.0, 4.0, 5.08, 6.0)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_arguments(parser, TINY_PROMPTS)
    parser.add_argument("--limit", type=at_least_one, help="only the first N prompts")
    parser.add_argument("--tau1", type=number, nargs="+")
    parser.add_argument("--tau2", type=number, nargs="+")
    parser.add_argument("--pairs", nargs="+", metavar="TAU1/TAU2[/HITS]", help="instead of the grid")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other field")
    parser.add_argument("--words", action="store_true", help="read the words back (OCR) in every image")
    parser.add_argument("--clip", help="also judge every image by CLIP-IQA: CLIP as a folder or hub id")
    add_loading_arguments(parser, default_device())
    parser.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N", help="every N-th prompt")
    parser.add_argument("--out", type=Path, default=Path("outputs/calibration"))
    parser.add_argument("--table", action="store_true", help="print what --out holds, draw nothing")
    return parser.parse_args(argv)


def measured(args: argparse.Namespace) -> dict:
    """Fill the records of this shard with a row for each prompt and pair; returns their settings."""
    contestants = [find_method("none")(), *configurations(args)]
    index, count = args.shard
    prompts = read_prompts(args.prompts)[: args.limit][index::count]
    if not prompts:
        raise ValueError(f"--shard {index}/{count}: {args.prompts} has no prompt for it")
    if args.words and (reason := words.problem()):
        raise ImportError(f"--words: {reason}")
    clip = ClipIqa(args.clip) if args.clip else None
    args.out.mkdir(parents=True, exist_ok=True)
    trial, earlier = Trial.of(args, prompts), read(args.out)
    settings = trial.settings | {"words": args.words, "clip": args.clip and store.place(args.clip)}
    settings = store.as_before(settings, [row.get("settings") for row in earlier])

    def rows(prompt: Prompt, drawn: dict[str, Drawn]) -> dict[str, dict]:
        uncached, *_ = drawn.values()
        return {
            name: {
                "prompt": prompt.text, "settings": settings, "seed": trial.seed_of(prompt),
                "method": configs[name].name, "config": store.settings_of(configs[name]),
                "seconds": round(result.seconds, 4), "seconds_uncached": round(uncached.seconds, 4),
                **{cost: getattr(result.summary, cost) for cost in ("blocks_run", "blocks", "hits")},
                **fidelity(result.image, uncached.image),
                "words": words.word_recall(prompt.words or (), result.image) if args.words else None,
                "clip_iqa": clip(result.image) if clip else None,
            }
            for name, result in drawn.items()
        }  # fmt: skip

    def key(prompt: Prompt, name: str) -> str:
        return store.run_key(**settings | {"prompt": prompt.text, "seed": trial.seed_of(prompt)}, config=name)

    configs = {repr(config): config for config in contestants}
    path, begin = args.out / f"records-{index}-of-{count}.jsonl", partial(trial.warm_up, configs=contestants)
    measure(path, prompts, configs, trial.draw, rows, key, {row["key"] for row in earlier}, begin)
    return settings


def run(args: argparse.Namespace, module: str, argv: list[str] | None = None) -> None:
    """Measure, for the command `module`; the table of this setting goes to summary.json."""
    settings = measured(args)
    lines = table(by_setting(read(args.out))[json.dumps(settings, sort_keys=True)])
    chosen = {str(wanted): best(lines, wanted) for wanted in WANTED}
    summary = provenance(module, args.device, argv) | {"settings": settings, "table": lines, "best": chosen}
    store.write_atomically(args.out / "summary.json", json.dumps(summary, indent=1).encode())
    for line in lines:
        print(show(line))
    for wanted, found in chosen.items():
        print(f"best with at least {wanted}x fewer blocks: {show(found) if found else 'none'}")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.table:
        return guarded(lambda: print(tables(args.out)), "")
    kept = f"the same command goes on; finished prompts are in {args.out}/"
    return guarded(lambda: run(args, "calibrate", argv), kept)


if __name__ == "__main__":
    sys.exit(main())
