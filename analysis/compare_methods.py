"""Every method at equal cost: fidelity over blocks executed, as one table and one plot.

    python -m analysis.compare_methods                     # embedded model, 80 prompts, 50 steps
    python -m analysis.compare_methods --limit 8 --no-words --out outputs/quick
    python -m analysis.compare_methods --only h2cache taylorseer

Draws and scores with `analysis.experiment` (interleaved, resumable; its arguments are accepted here), each
method at several settings. A method's figure at "3x fewer blocks" lies on the straight line between its two
nearest settings, in the logarithm of the ratio; nothing is extrapolated. Into --out: rows.jsonl (one row a
picture), methods.json, methods.md and methods.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from statistics import fmean, median

import matplotlib
from accelerate import PartialState

from analysis import experiment, keep

WANTED = (2.0, 3.0, 4.0, 5.0, 6.0)
PAIRS = ((0.05, 0.02), (0.06, 0.02), (0.12, 0.02), (0.2, 0.05), (0.35, 0.2), (0.5, 0.3))  # tau1, tau2
LADDERS = {  # name in the plot: contestants, chosen to reach from 2x to 6x on the embedded model
    "fewer steps": ["fewer_steps:factor=2,3,4,5,6"],
    "Block Cache": ["block_cache:threshold=0.05,0.1,0.15,0.2,0.3"],
    "TeaCache": ["teacache:threshold=0.035,0.06,0.09,0.13,0.18"],
    "MagCache": ["magcache:threshold=0.05,0.15,0.4,0.8,2:max_consecutive_hits=9:retention=0.04"],
    "TaylorSeer": ["taylorseer:order=2:interval=2,3,4,6,8"],
    "TaylorSeer-Lite": ["taylorseer_lite:order=2:interval=2,3,4,6,8"],
    "HiCache": ["hicache:sigma=0.7:interval=2,3,4,6,8"],
    "ClusCa": ["clusca:order=2:exact_fresh=true:interval=2,3,4,6,8"],
    "SpeCa": [
        f"speca:base={base}:decay=1:floor=0:min_drafts=1:max_drafts={most}"
        for base, most in ((7, 1), (0.02, 2), (0.1, 6), (0.2, 8), (0.5, 9), (7, 9))
    ],
    "H2-Cache": [f"h2cache:tau1={a}:tau2={b}" for a, b in PAIRS],
    "H2-Cache, Taylor": [f"h2cache:tau1={a}:tau2={b}:predictor=taylor" for a, b in PAIRS],
    "H2-Cache, ahead": [
        f"h2cache:ahead=true:predictor=taylor:repay=true:tau1={tau / 2}:tau2={tau}"
        for tau in (0.01, 0.02, 0.04, 0.06, 0.09, 0.14)
    ],
}
KEPT = ("id", "label", "method", "config", "psnr", "ssim", "words_read", "seconds", "seconds_steps")
KEPT += ("blocks_run", "blocks", "bytes_held", "seed", "date", "key")


def ladder_points(rows: list[dict], labels: list[str]) -> list[dict]:
    """Means over prompts for each setting of one method, by rising ratio."""
    base = {row["id"]: row for row in rows if row["method"] == "none"}
    points = []
    for label in labels:
        mine = [row for row in rows if row["label"] == label]
        psnr = [row["psnr"] for row in mine if row["psnr"] is not None]
        if not psnr:
            continue
        words = [row["words_read"] for row in mine if row["words_read"] is not None]
        points.append(
            {
                "label": label,
                "prompts": len(mine),
                "ratio": sum(base[r["id"]]["blocks_run"] for r in mine) / sum(r["blocks_run"] for r in mine),
                "psnr": fmean(psnr),
                "worst": min(psnr),
                "words": fmean(words) if words else None,
                "speed_up": median(base[row["id"]]["seconds"] / row["seconds"] for row in mine),
                "bytes": max(row["bytes_held"] for row in mine),
            }
        )
    return sorted(points, key=lambda point: point["ratio"])


def at_ratio(points: list[dict], wanted: float) -> dict | None:
    """The figures at `wanted` times fewer blocks, between the two nearest settings; None outside of them."""
    for low, high in itertools.pairwise(points):
        if low["ratio"] <= wanted <= high["ratio"]:
            span = math.log(high["ratio"] / low["ratio"])
            part = math.log(wanted / low["ratio"]) / span if span else 0.0
            names = ("psnr", "worst", "words", "speed_up", "bytes")
            names = [name for name in names if None not in (low[name], high[name])]
            return {name: low[name] + part * (high[name] - low[name]) for name in names}
    return None


def markdown(ladders: dict[str, list[dict]]) -> str:
    """PSNR at each wanted ratio, and what a method costs at 5x."""
    heads = [f"{wanted:g}x" for wanted in WANTED]
    lines = [f"| PSNR dB at fewer blocks | {' | '.join(heads)} | words % at 5x | time at 5x | MiB at 5x |"]
    lines.append("|---" * (len(heads) + 4) + "|")
    for name, points in ladders.items():
        found = [at_ratio(points, wanted) for wanted in WANTED]
        cells = ["-" if f is None else f"{f['psnr']:.1f}" for f in found]
        five = at_ratio(points, 5.0) or {}
        cells.append(f"{100 * five['words']:.1f}" if "words" in five else "-")
        cells.append(f"{five['speed_up']:.2f}x" if five else "-")
        cells.append(f"{five['bytes'] / 2**20:.2f}" if five else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(ladders: dict[str, list[dict]], path: Path) -> None:
    """PSNR over the ratio, one line a method."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), dpi=150)
    for n, (name, points) in enumerate(ladders.items()):
        ours = name.startswith("H2")
        style = {"linewidth": 2.5 if ours else 1.2, "marker": "os^Dv<>pPX*h"[n % 12], "markersize": 5}
        axes.plot([p["ratio"] for p in points], [p["psnr"] for p in points], label=name, **style)
    axes.set(
        xlabel="times fewer blocks executed", ylabel="PSNR against the uncached image, dB", xlim=(1.5, 7)
    )
    axes.grid(linestyle="--", linewidth=0.5)
    axes.legend(fontsize=8)
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--only", nargs="+", help="methods by file name, such as h2cache taylorseer")
    given = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(given):
        print(__doc__)
    known, rest = parser.parse_known_args(given)
    chosen = {
        name: texts
        for name, texts in LADDERS.items()
        if known.only is None or texts[0].partition(":")[0] in known.only
    }
    if not chosen:
        parser.error(f"--only {' '.join(known.only)}: there is no ladder of such a method")
    methods = [text for texts in chosen.values() for text in texts]
    args = experiment.arguments([*rest, "--methods", *methods])
    try:
        return run(args, chosen, given)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, chosen: dict[str, list[str]], given: list[str]) -> int:
    drawn = experiment.Experiment(args, PartialState(cpu=args.device == "cpu"))
    drawn.prepare()
    failed = drawn.draw()
    drawn.score()
    rows = [{name: row[name] for name in KEPT} for row in drawn.rows()]
    checkpoint = experiment.checkpoint_name(drawn.pipeline)
    ladders = {}
    for name, texts in chosen.items():
        labels = [c.label for c in experiment.contestants(texts, args.model, checkpoint)[1:]]
        ladders[name] = ladder_points(rows, labels)
    keep.write_records(args.out / "rows.jsonl", {f"{row['label']} {row['id']}": row for row in rows})
    command = f"python -m analysis.compare_methods {' '.join(given)}".strip()
    about = {"command": command, "machine": keep.machine(), "date": keep.now(), "settings": drawn.settings}
    keep.write_atomically(
        args.out / "methods.json", json.dumps(about | {"methods": ladders}, indent=1).encode()
    )
    text = markdown(ladders)
    keep.write_atomically(args.out / "methods.md", text.encode())
    plot(ladders, args.out / "methods.png")
    print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
