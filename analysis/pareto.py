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
from collections import Counter
from pathlib import Path
from statistics import fmean, median

import numpy as np

from analysis.ablations.trial import parser_of, source_of
from analysis.cli import figure_script, passed_on, shipped
from analysis.experiment import main as experiment
from analysis.figures import style
from analysis.records.compare import as_table, bootstrap, front, groups, known, number, paired, times_fewer
from analysis.records.saved import MAYBE, NUMBER, Saved, read_saved
from analysis.table import PUBLISHED, published
from h2cache.presets import PRESETS

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
METRICS = {  # field: axis label, higher is better
    "psnr": ("PSNR against uncached, dB", True),
    "ssim": ("SSIM against uncached", True),
    "gmsd": ("GMSD against uncached", False),
    "words_read": ("words read, change against uncached", True),
    "clip_iqa": ("CLIP-IQA, change against uncached", True),
}
COSTS = {
    "blocks_ratio": "blocks executed, times fewer",
    "speed_up": "time of the call, times shorter",
    "mebibytes": "cache held, MiB",
}
ALONE = ("words_read", "clip_iqa")  # the uncached picture has a value too: shown is the paired difference
CONTROL = "fewer_steps"
RATIOS = (2.0, 3.0, 4.0, 5.0, 6.0)
OURS = ("plan", "h2cache")
FEW, SPEEDS = ("plan", "plan file=none", "h2cache", CONTROL), (2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "pareto")
    parser.add_argument("--records", type=Path, default=SHIPPED, help="rows.jsonl of `analysis.experiment`")
    parser.add_argument("--metric", nargs="+", choices=list(METRICS), help="default: all that were measured")
    parser.add_argument("--methods", nargs="+", default=CONTESTANTS, help="of the run, as in the experiment")
    parser.set_defaults(prompts=None)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> tuple[Path, int]:
    """The experiment with many settings of each method; returns its rows and its exit code.

    1: some pictures failed, the others can be drawn; above: nothing can.
    """
    command = ["--out", str(args.out), *passed_on(args, "limit"), "--methods", *args.methods]
    return args.out / "rows.jsonl", experiment(command)


def read(path: Path) -> Saved:
    """Rows of an experiment; those of a prompt without its uncached picture are left out."""
    saved = read_saved([path], NEEDS, same=SAME, unique=("label", "key"))
    saved.keep_with_uncached(path)
    if not any(row["method"] != "none" for row in saved.rows):
        saved.exit_code()
        raise ValueError(f"{path} holds no cached picture with its uncached one")
    return saved


def lines_of(labels: list[str]) -> dict[str, str]:
    """The line that each contestant is a point of: its method, and what of its settings is a word.

    The words go where a method makes one line only, unless they have a look of their own.
    """

    def words(label: str) -> str:
        method, *settings = _spelt_out(label).split(" ")
        return " ".join([method, *sorted(s for s in settings if not _is_number(s.partition("=")[2]))])

    lines = {label: words(label) for label in labels}
    several = Counter(line.split(" ")[0] for line in set(lines.values()))
    return {
        label: line if line in style.LOOKS or several[line.split(" ")[0]] > 1 else line.split(" ")[0]
        for label, line in lines.items()
    }


def _spelt_out(label: str) -> str:
    """A preset's label, `h2cache (tiny_flux-5x)`, as that of its settings; others as they are."""
    method, _, rest = label.partition(" (")
    preset = PRESETS.get(rest.removesuffix(")"))
    if preset is None:
        return label
    settings = sorted(preset.settings.items())
    return " ".join([method, *(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in settings)])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def points(rows: list[dict], metric: str) -> list[dict]:
    """One point for each contestant, in the order of the rows: cost, quality with interval."""
    line = lines_of(list(dict.fromkeys(row["label"] for row in rows)))
    base = {row["id"]: row for row in rows if row["method"] == "none"}
    found = []
    for label, mine in groups(rows, "label").items():
        uncached = [base[row["id"]] for row in mine]
        values = known(mine, metric)
        if not values:
            continue
        quality = (
            (paired(mine, uncached, metric) or bootstrap([0.0])) if metric in ALONE else bootstrap(values)
        )
        found.append({
            "label": label, "line": line[label], "method": mine[0]["method"], "prompts": len(mine),
            "blocks_ratio": times_fewer(mine, uncached),
            "speed_up": median(base[r["id"]]["seconds"] / r["seconds"] for r in mine),
            "mebibytes": max(r["bytes_held"] for r in mine) / 2**20,
            "mean": fmean(values), "quality": quality.mean, "low": quality.low, "high": quality.high,
        })  # fmt: skip
    return found


def at(found: list[dict], line: str, ratio: float, what: str = "quality") -> float | None:
    """`what` of a line at `ratio` times fewer blocks, between its measured points; None beyond them."""
    mine = sorted((p for p in found if p["line"] == line), key=lambda p: p["blocks_ratio"])
    x = [p["blocks_ratio"] for p in mine]
    if len(x) < 2 or not x[0] <= ratio <= x[-1]:
        return None
    return float(np.interp(ratio, x, [p[what] for p in mine]))


def _in_order(found: list[dict]) -> list[str]:
    """The lines: ours first, the control last."""

    def place(line: str) -> tuple:
        ours = [name for name in OURS if line.startswith(name)]
        return (OURS.index(ours[0]) if ours else len(OURS), line == CONTROL, line)

    return sorted({p["line"] for p in found}, key=place)


# The figure.


def draw(found: list[dict], metric: str, others: list[dict], path: Path) -> None:
    label, higher = METRICS[metric]
    sign = 1 if higher else -1
    cached = [p for p in found if p["method"] != "none"]
    methods = _in_order(cached)
    with style.figure(style.PAGE, 5.0) as figure:
        grid = figure.subplots(2, 2)
        for n, (axes, (cost, title)) in enumerate(zip(grid.flat, COSTS.items(), strict=False)):
            for method in methods:
                mine = sorted((p for p in cached if p["line"] == method), key=lambda p: p["blocks_ratio"])
                look = style.look(method)
                x, y = [p[cost] for p in mine], np.array([p["quality"] for p in mine])
                ends = np.abs(np.array([[p["low"] for p in mine], [p["high"] for p in mine]]) - y)
                joined = "none" if cost == "mebibytes" else "--" if method == CONTROL else "-"
                if cost != "mebibytes":  # there the points of many methods share a place
                    paint = {"linestyle": "none", "ecolor": look.colour, "elinewidth": 0.7, "capsize": 1.2}
                    axes.errorbar(x, y, ends, **paint)
                axes.plot(x, y, linestyle=joined, label=look.name, linewidth=0.9, zorder=3, **look.points)
            if cost != "mebibytes":
                caches = [p for p in cached if p["method"] != CONTROL]
                best = front(caches, lambda p, cost=cost: (p[cost], sign * p["quality"]))
                x, y = [p[cost] for p in best], [p["quality"] for p in best]
                axes.plot(x, y, color="#bbbbbb", linewidth=5, zorder=1, label="front of the caches")
            if metric in ALONE:
                axes.axhline(0, color="black", linestyle=":", linewidth=0.8, label="uncached")
            axes.set(xlabel=title, ylabel=label.replace(", change", ",\nchange"))
            style.letter(axes, f"{'abc'[n]}  against {('blocks', 'time', 'memory')[n]}")
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        _draw_published(grid[1, 1], others)
        best = front(cached, lambda p: (p["blocks_ratio"], sign * p["quality"]))
        data = [p | {"on_front": p in best} for p in found]
        style.save(figure, path, data)


def _draw_published(axes, others: list[dict]) -> None:
    """What the papers printed: other model, machines and metric, so no point of ours stands here."""
    shown = [r for r in others if r["speed_up"] and r["clip_iqa"] is not None]
    for row in shown:
        look = style.look(row["method"])
        paint = {"color": look.colour, "marker": look.marker, "markerfacecolor": "none", "linestyle": "none"}
        axes.plot(row["speed_up"], row["clip_iqa"], label=f"paper: {look.name}", **paint)
    axes.legend(loc="center left")
    axes.set(xlabel="time, times shorter (as printed)", ylabel="CLIP-IQA (variant not told)")
    style.letter(axes, "d  published: FLUX.1-dev, CUTE80")


# The answer.


def answer(measured: dict[str, list[dict]], source: str) -> str:
    lines = [f"Source: {source}.", *by_speed(measured), *at_once(measured)]
    for metric, found in measured.items():
        methods = _in_order([p for p in found if p["method"] != "none"])
        form = ".1f" if metric == "psnr" else "+.3f" if metric in ALONE else ".3f"
        cells = [[style.look(m).name, *(number(at(found, m, r), form) for r in RATIOS)] for m in methods]
        lines += [
            "",
            f"{METRICS[metric][0]} at equal numbers of executed blocks (between measured points):",
            "",
        ]
        lines += as_table(["method", *(f"{r:g}x fewer" for r in RATIOS)], cells)
    return "\n".join(lines)


def by_speed(measured: dict[str, list[dict]]) -> list[str]:
    """PSNR of the plan, the paper's rule and the control at each speed, as one table."""
    found = measured.get("psnr", [])
    if not {p["line"] for p in found} >= set(FEW):
        return []
    cells = [[style.look(line).name, *(number(at(found, line, r), ".1f") for r in SPEEDS)] for line in FEW]
    heads = ["", *(f"{r:g}x" for r in SPEEDS)]
    return ["", "PSNR in dB, at so many times fewer executed blocks:", "", *as_table(heads, cells)]


def at_once(measured: dict[str, list[dict]]) -> list[str]:
    """Every method at 5x, as one table."""
    found, words = measured.get("psnr"), measured.get("words_read", [])
    if not found:
        return []
    columns = ((found, "quality", "{:.1f}"), (words, "mean", "{:.1%}"), (found, "speed_up", "{:.2f}x"),
               (found, "mebibytes", "{:.2f} MiB"))  # fmt: skip
    cells = []
    for line in _in_order([p for p in found if p["method"] != "none"]):
        values = [(at(those, line, 5.0, what), form) for those, what, form in columns]
        cells.append([style.look(line).name, *(None if v is None else form.format(v) for v, form in values)])
    heads = ("method", "PSNR, dB", "words read", "time", "cache")
    return ["", "Every method at 5x fewer executed blocks:", "", *as_table(heads, cells)]


@figure_script
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    path, code = run(args) if args.run else (args.records, 0)
    if code not in (0, 1):
        return code
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
