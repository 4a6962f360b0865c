"""Measure H2-Cache's thresholds on a model: the whole (tau1, tau2) plane, and the best pair for a speed-up.

    python -m analysis.calibrate                     # embedded model, 32 prompts, 50 steps
    python -m analysis.calibrate --model black-forest-labs/FLUX.1-dev --steps 50 --prompts my.jsonl

Every pair draws the same prompts with the same seeds; contestants take turns prompt by prompt, so that a
machine that drifts is fair. After each prompt the rows are written (records.jsonl): a killed run goes on.
The best pair for a speed-up S is the one of highest mean PSNR among those with at least S times fewer blocks.
--shard I/N does every N-th prompt only, for N processes that share --out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median

import torch
from tqdm import tqdm

from analysis import keep
from analysis.metrics import ClipIqa, fidelity
from analysis.ocr import word_recall
from analysis.prompts import read_prompts
from analysis.runs import Limits, call_arguments, default_device, draw, load_pipeline
from h2cache import H2Config, find_method
from h2cache.method import parse_settings

GRID = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6)
WANTED = (2.0, 3.0, 4.0, 5.08, 6.0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="assets/tiny_flux")
    parser.add_argument("--prompts", type=Path, default=Path("assets/prompts/tiny32.jsonl"))
    parser.add_argument("--tau1", type=float, nargs="+", default=GRID)
    parser.add_argument("--tau2", type=float, nargs="+", default=GRID)
    parser.add_argument("--pairs", nargs="+", metavar="TAU1/TAU2[/HITS]", help="instead of the grid")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other field")
    parser.add_argument("--words", action="store_true", help="read the words back (OCR) in every image")
    parser.add_argument("--clip", help="also judge every image by CLIP-IQA: CLIP as a folder or hub id")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--shard", default="0/1", help="I/N: every N-th prompt, from the I-th")
    parser.add_argument("--out", type=Path, default=Path("outputs/calibration"))
    parser.add_argument(
        "--table", action="store_true", help="draw nothing, print what --out holds as Markdown"
    )
    return parser.parse_args()


def configurations(args: argparse.Namespace) -> list[H2Config]:
    others = parse_settings(H2Config, args.set)
    pairs = args.pairs or ["/".join(map(str, pair)) for pair in itertools.product(args.tau1, args.tau2)]
    configs = []
    for pair in pairs:
        tau1, tau2, *hits = pair.split("/")
        given = [f"tau1={tau1}", f"tau2={tau2}", *(f"max_consecutive_hits={n}" for n in hits)]
        configs.append(H2Config(**others | parse_settings(H2Config, given)))
    return configs


def measure(args: argparse.Namespace) -> None:
    """Fill `records.jsonl` (of this shard) with a row for each prompt and pair."""
    limits = Limits.of(args.model)
    torch.set_num_threads(limits.cpu_threads or torch.get_num_threads())
    pipeline = load_pipeline(args.model, args.device, args.dtype)
    pipeline.set_progress_bar_config(disable=True)
    call = call_arguments(pipeline, limits, None, None, args.guidance) | {"num_inference_steps": args.steps}
    index, count = map(int, args.shard.split("/"))
    prompts = read_prompts(args.prompts)[index::count]
    path = args.out / f"records-{index}-of-{count}.jsonl"
    rows = keep.read_records(path)
    contestants = [find_method("none")(), *configurations(args)]
    clip = ClipIqa(args.clip) if args.clip else None
    draw(pipeline, contestants[0], 0, prompt=prompts[0].text, **call)  # warm-up, untimed
    for prompt in tqdm(prompts, unit="prompt"):
        seed = args.seed if prompt.seed is None else prompt.seed
        fixed = {"model": args.model, "prompt": prompt.text, "seed": seed, "call": call, "words": args.words}
        fixed |= {"clip": args.clip} if clip else {}
        keys = [keep.run_key(**fixed, config=repr(config)) for config in contestants]
        if all(key in rows for key in keys):
            continue
        # All pictures first, then the metrics: reading words would leave cold caches to the next picture.
        drawn = [draw(pipeline, config, seed, prompt=prompt.text, **call) for config in contestants]
        for key, config, result in zip(keys, contestants, drawn, strict=True):
            rows[key] = {
                "key": key,
                "id": prompt.id,
                "method": config.name,
                "config": keep.settings_of(config),
                "seconds": round(result.seconds, 4),
                "seconds_uncached": round(drawn[0].seconds, 4),  # of the same turn
                "blocks_run": result.summary.blocks_run,
                "blocks": result.summary.blocks,
                "hits": result.summary.hits,
                **fidelity(result.image, drawn[0].image),
                "words": word_recall(prompt.words or (), result.image) if args.words else None,
                "clip_iqa": clip(result.image) if clip else None,
            }
        keep.write_records(path, rows)


def table(rows: list[dict]) -> list[dict]:
    """One line for each pair, over prompts: means (of time: medians), against the uncached pictures."""
    base = {r["id"]: r for r in rows if r["method"] == "none"}
    cached = [r for r in rows if r["method"] != "none"]
    settings = {json.dumps(r["config"]): r["config"] for r in cached}
    lines = []
    for config in sorted(settings.values(), key=lambda c: (float(c["tau1"]), float(c["tau2"]))):
        mine = [r for r in cached if r["config"] == config]
        psnr = [r["psnr"] for r in mine if r["psnr"] is not None]
        words = [r["words"] for r in mine if r["words"] is not None]
        clip = [r["clip_iqa"] for r in mine if r.get("clip_iqa") is not None]
        lines.append(
            {
                "config": config,
                "prompts": len(mine),
                "blocks": sum(base[r["id"]]["blocks_run"] for r in mine) / sum(r["blocks_run"] for r in mine),
                "speed_up": median(r["seconds_uncached"] / r["seconds"] for r in mine),
                "seconds": median(r["seconds"] for r in mine),
                "seconds_uncached": median(r["seconds_uncached"] for r in mine),
                "psnr": fmean(psnr) if psnr else None,
                "worst_psnr": min(psnr, default=None),
                "ssim": fmean(r["ssim"] for r in mine),
                "words": fmean(words) if words else None,
                "words_uncached": fmean(base[r["id"]]["words"] for r in mine) if words else None,
                "clip_iqa": fmean(clip) if clip else None,
            }
        )
    return lines


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
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for line in lines:
        config = line["config"]
        cells = [config["tau1"], config["tau2"], config["max_consecutive_hits"] or "any"]
        cells += [f"{line['blocks']:.2f}x fewer", f"{line['speed_up']:.2f}x", f"{line['seconds']:.2f}"]
        cells += ["identical" if line["psnr"] is None else f"{line['psnr']:.1f}", f"{line['ssim']:.3f}"]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def read(folder: Path) -> list[dict]:
    """All rows of a calibration, whichever processes wrote them."""
    paths = sorted(folder.glob("records-*.jsonl"))
    return [row for path in paths for row in keep.read_records(path).values()]


def main() -> int:
    args = arguments()
    if args.table:
        print(markdown(table(read(args.out))))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        measure(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines = table(read(args.out))
    summary = {
        "command": f"python -m analysis.calibrate {' '.join(sys.argv[1:])}",
        "machine": keep.machine(),
        "date": keep.now(),
        "table": lines,
        "best": {str(wanted): best(lines, wanted) for wanted in WANTED},
    }
    keep.write_atomically(args.out / "summary.json", json.dumps(summary, indent=1).encode())
    for line in lines:
        print(show(line))
    for wanted in WANTED:
        found = best(lines, wanted)
        print(f"best with at least {wanted}x fewer blocks: {show(found) if found else 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
