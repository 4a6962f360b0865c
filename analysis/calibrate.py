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
import itertools
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

from analysis.cli import TINY, guarded, shard, shipped, warn
from analysis.drawing.draw import Drawn, default_device
from analysis.drawing.families import add_family_arguments
from analysis.drawing.load import add_loading_arguments
from analysis.drawing.prompts import Prompt, read_prompts
from analysis.measures import words
from analysis.measures.fidelity import ClipIqa, fidelity
from analysis.measuring import Trial, measure
from analysis.options import Parser, at_least_one, number, seed, side
from analysis.records import store
from analysis.records.compare import as_table, known, mean, times_fewer
from analysis.records.provenance import provenance
from analysis.records.saved import MAYBE, NUMBER, check_fields
from analysis.settings import parse_settings
from h2cache import H2Config, find_method

GRID = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6)
WANTED = (2.0, 3.0, 4.0, 5.08, 6.0)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", default=TINY, help="folder or hub id (default: %(default)s)")
    parser.add_argument("--prompts", type=Path, default=Path(shipped("assets/prompts/tiny32.jsonl")))
    parser.add_argument("--limit", type=at_least_one, help="only the first N prompts")
    parser.add_argument("--tau1", type=number, nargs="+")
    parser.add_argument("--tau2", type=number, nargs="+")
    parser.add_argument("--pairs", nargs="+", metavar="TAU1/TAU2[/HITS]", help="instead of the grid")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other field")
    parser.add_argument("--words", action="store_true", help="read the words back (OCR) in every image")
    parser.add_argument("--clip", help="also judge every image by CLIP-IQA: CLIP as a folder or hub id")
    parser.add_argument("--steps", type=at_least_one, default=50)
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--height", type=side, help="pixels (default: the model's)")
    parser.add_argument("--width", type=side, help="pixels (default: the model's)")
    add_family_arguments(parser)
    add_loading_arguments(parser, default_device())
    parser.add_argument("--shard", type=shard, default=(0, 1), metavar="I/N", help="every N-th prompt")
    parser.add_argument("--out", type=Path, default=Path("outputs/calibration"))
    parser.add_argument(
        "--table", action="store_true", help="draw nothing, print what --out holds as Markdown"
    )
    return parser.parse_args(argv)


def configurations(args: argparse.Namespace) -> list[H2Config]:
    """The settings that --pairs, or --tau1 and --tau2, and --set name."""
    others = parse_settings(H2Config, args.set)
    if args.pairs and (args.tau1 or args.tau2):
        raise ValueError("--pairs and --tau1 or --tau2 name the same thresholds: give one of them")
    grid = itertools.product(args.tau1 or GRID, args.tau2 or GRID)
    pairs = args.pairs or ["/".join(map(str, pair)) for pair in grid]
    configs = []
    for pair in pairs:
        parts = pair.split("/")
        if len(parts) not in (2, 3):
            raise ValueError(f"--pairs {pair}: the form is TAU1/TAU2 or TAU1/TAU2/HITS, such as 0.3/0.1")
        names = ("tau1", "tau2", "max_consecutive_hits")
        given = [f"{name}={part}" for name, part in zip(names, parts, strict=False)]
        if twice := [name for name in names[: len(parts)] if name in others]:
            raise ValueError(
                f"--set {twice[0]}={others[twice[0]]}: --pairs, or --tau1 and --tau2, say it already"
            )
        configs.append(H2Config(**others | parse_settings(H2Config, given)))
    return configs


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
                "prompt": prompt.text,
                "settings": settings,
                "seed": trial.seed_of(prompt),
                "method": configs[name].name,
                "config": store.settings_of(configs[name]),
                "seconds": round(result.seconds, 4),
                "seconds_uncached": round(uncached.seconds, 4),  # of the same turn
                "blocks_run": result.summary.blocks_run,
                "blocks": result.summary.blocks,
                "hits": result.summary.hits,
                **fidelity(result.image, uncached.image),
                "words": words.word_recall(prompt.words or (), result.image) if args.words else None,
                "clip_iqa": clip(result.image) if clip else None,
            }
            for name, result in drawn.items()
        }

    def key(prompt: Prompt, name: str) -> str:
        return store.run_key(**settings | {"prompt": prompt.text, "seed": trial.seed_of(prompt)}, config=name)

    configs = {repr(config): config for config in contestants}
    path, begin = args.out / f"records-{index}-of-{count}.jsonl", partial(trial.warm_up, configs=contestants)
    measure(path, prompts, configs, trial.draw, rows, key, {row["key"] for row in earlier}, begin)
    return settings


def by_setting(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of each setting; those from before rows said theirs count as one, under ""."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        told = row.get("settings")
        found.setdefault(json.dumps(told, sort_keys=True) if told else "", []).append(row)
    return found


def table(rows: list[dict]) -> list[dict]:
    """One line for each pair, over prompts: means (of time: medians), against the uncached pictures.

    Raises ValueError for rows of several settings (`by_setting` divides them).
    """
    if len(by_setting(rows)) > 1:
        raise ValueError(f"rows of several settings do not make one table: {', '.join(by_setting(rows))}")
    base = {_drawn(r): r for r in rows if r["method"] == "none"}
    cached = [r for r in rows if r["method"] != "none"]
    settings = {json.dumps(r["config"]): r["config"] for r in cached}
    lines = []
    for config in sorted(settings.values(), key=lambda c: (float(c["tau1"]), float(c["tau2"]))):
        mine = [r for r in cached if r["config"] == config]
        uncached = [base[_drawn(r)] for r in mine]
        lines.append(
            {
                "config": config,
                "prompts": len(mine),
                "blocks": times_fewer(mine, uncached),
                "speed_up": median(r["seconds_uncached"] / r["seconds"] for r in mine),
                "seconds": median(r["seconds"] for r in mine),
                "seconds_uncached": median(r["seconds_uncached"] for r in mine),
                "psnr": mean(mine, "psnr"),
                "worst_psnr": min(known(mine, "psnr"), default=None),
                "ssim": mean(mine, "ssim"),
                "words": mean(mine, "words"),
                "words_uncached": mean(uncached, "words"),
                "clip_iqa": mean(mine, "clip_iqa"),
            }
        )
    return lines


def _drawn(row: dict) -> tuple:
    """What a row is of: two prompt files may use one id."""
    return row["id"], row.get("prompt"), row.get("seed")


def best(lines: list[dict], blocks: float) -> dict | None:
    """The pair of highest PSNR with at least `blocks` times fewer blocks."""
    return max(
        (p for p in lines if p["blocks"] >= blocks and p["psnr"]), key=lambda p: p["psnr"], default=None
    )


def show(line: dict) -> str:
    usual = asdict(H2Config())
    pair = ("tau1", "tau2")
    told = ", ".join(f"{k} {v}" for k, v in line["config"].items() if k in pair or v != usual[k])
    parts = [f"{told:<24} blocks {line['blocks']:5.2f}x  time {line['speed_up']:5.2f}x"]
    if line["psnr"] is None:
        parts.append("identical")
    else:
        parts.append(f"PSNR {line['psnr']:5.2f} dB (worst {line['worst_psnr']:.2f})  SSIM {line['ssim']:.4f}")
    if line["words"] is not None:
        parts.append(f"words {line['words']:.3f} (uncached {line['words_uncached']:.3f})")
    return "  ".join(parts)


def markdown(lines: list[dict]) -> str:
    """The saved measurements as the table of the README."""
    heads = ("tau1", "tau2", "hits in a row", "blocks", "time", "seconds", "PSNR dB", "SSIM")
    rows = []
    for line in lines:
        config = line["config"]
        cells = [config["tau1"], config["tau2"], config["max_consecutive_hits"] or "any"]
        cells += [f"{line['blocks']:.2f}x fewer", f"{line['speed_up']:.2f}x", f"{line['seconds']:.2f}"]
        cells += ["identical" if line["psnr"] is None else f"{line['psnr']:.1f}", f"{line['ssim']:.3f}"]
        rows.append(cells)
    return "\n".join(as_table(heads, rows))


def read(folder: Path) -> list[dict]:
    """All rows of a calibration, whichever processes wrote them, each once; packed files too."""
    rows: dict[str, dict] = {}
    for path in sorted([*folder.glob("records-*.jsonl"), *folder.glob("records-*.jsonl.gz")]):
        rows |= store.read_records(path)
    return [row for row in rows.values() if _usable(row, folder)]


NEEDS = {"id": str, "method": str, "config": dict, "seconds": NUMBER, "seconds_uncached": NUMBER}
NEEDS |= {"blocks_run": int, "psnr": MAYBE, "ssim": NUMBER, "words": MAYBE}


def _usable(row: dict, folder: Path) -> bool:
    """Whether a table can be made of `row`; says why not."""
    try:
        check_fields(row, NEEDS)
        if row["seconds"] <= 0 or row["blocks_run"] <= 0:
            raise ValueError("it took no time or ran no block")
    except ValueError as error:
        warn(f"{folder}: the record {row['key']} is left out: {error}")
        return False
    return True


def tables(folder: Path) -> str:
    """What `folder` holds as Markdown, a table for each setting."""
    found = by_setting(read(folder))
    if not found:
        raise FileNotFoundError(f"{folder} holds no records of a calibration (records-*.jsonl)")
    heads = [f"Settings: {setting or 'not told'}\n\n" if len(found) > 1 else "" for setting in found]
    return "\n\n".join(head + markdown(table(rows)) for head, rows in zip(heads, found.values(), strict=True))


def run(args: argparse.Namespace, about: dict) -> None:
    """Measure; the table of this setting goes to summary.json, with the provenance `about`."""
    settings = measured(args)
    lines = table(by_setting(read(args.out))[json.dumps(settings, sort_keys=True)])
    chosen = {str(wanted): best(lines, wanted) for wanted in WANTED}
    summary = about | {"settings": settings, "table": lines, "best": chosen}
    store.write_atomically(args.out / "summary.json", json.dumps(summary, indent=1).encode())
    for line in lines:
        print(show(line))
    for wanted, found in chosen.items():
        print(f"best with at least {wanted}x fewer blocks: {show(found) if found else 'none'}")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    kept = f"the same command goes on; finished prompts are in {args.out}/"

    def work() -> None:
        if args.table:
            print(tables(args.out))
        else:
            run(args, provenance("calibrate", args.device, argv))

    return guarded(work, kept)


if __name__ == "__main__":
    sys.exit(main())
