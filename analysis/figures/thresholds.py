"""The plane of tau1 and tau2 as heat maps, and its best pairs as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from analysis.figures import style
from analysis.records.compare import as_table, front, number, paired

PAPER = (0.15, 0.22)
METRICS = {  # field: title, format
    "blocks": ("blocks executed: times fewer", ".1f"),
    "speed_up": ("time of the whole call: times shorter", ".1f"),
    "psnr": ("PSNR against the uncached image, dB", ".1f"),
    "words": ("words read back, share", ".2f"),
    "clip_iqa": ("CLIP-IQA (ViT-L/14)", ".3f"),
}
OTHERS = {"ssim": "SSIM", "words": "words", "clip_iqa": "CLIP-IQA"}  # may choose another pair than PSNR
FLOORS = (40.0, 35.0, 30.0)  # dB
RATIOS = (2.0, 3.0, 4.0, 5.0)


def axes_of(lines: list[dict]) -> tuple[list[float], list[float]]:
    """The thresholds that make up the grid: those with at least half as many partners as the most."""
    found = []
    for name in ("tau1", "tau2"):
        counts = Counter(line["config"][name] for line in lines)
        found.append(sorted(v for v, n in counts.items() if 2 * n >= max(counts.values())))
    return found[0], found[1]


def pair(line: dict) -> tuple[float, float]:
    return line["config"]["tau1"], line["config"]["tau2"]


def draw(lines: list[dict], presets: dict[tuple, str], path: Path) -> None:
    rows, columns = axes_of(lines)
    measured = {pair(line): line for line in lines}
    best = {pair(line) for line in on_front(lines)}
    shown = [name for name in METRICS if any(line[name] is not None for line in lines)]
    across = 2 if len(shown) > 1 else 1
    down = -(-len(shown) // across)
    with style.figure(style.PAGE, 0.45 + 2.75 * down) as figure:
        grid = figure.subplots(down, across, squeeze=False)
        for n, (axes, name) in enumerate(zip(grid.flat, shown, strict=False)):
            values = np.array(
                [[(measured.get((a, b)) or {}).get(name) for b in columns] for a in rows], float
            )  # null is nan
            axes.grid(False)
            axes.set_facecolor("#eeeeee")
            axes.pcolormesh(np.ma.masked_invalid(values), cmap="viridis", rasterized=True)
            middle = np.nanmean([np.nanmin(values), np.nanmax(values)])
            for y, a in enumerate(rows):
                for x, b in enumerate(columns):
                    _cell(axes, x, y, values[y, x], middle, METRICS[name][1])
                    if (a, b) in best:
                        _frame(axes, x, y, "white", "-", 1.6)
                        _frame(axes, x, y, "black", "-", 0.7)
                    if (a, b) in presets:
                        axes.plot(x + 0.86, y + 0.84, marker="*", color="white", markeredgecolor="black",
                                  markeredgewidth=0.4, markersize=5)  # fmt: skip
                    if (a, b) == PAPER:
                        _frame(axes, x, y, "#D55E00", "--", 1.2)
            axes.set_xticks(np.arange(len(columns)) + 0.5, [f"{b:g}" for b in columns])
            axes.set_yticks(np.arange(len(rows)) + 0.5, [f"{a:g}" for a in rows])
            axes.set(xlabel="tau2 (detail)", ylabel="tau1 (structure)")
            style.letter(axes, f"{'abcde'[n]}  {METRICS[name][0]}")
        for axes in list(grid.flat)[len(shown) :]:
            axes.set_visible(False)
        marks = [
            axes.plot([], [], **paint, label=label)[0]
            for paint, label in (
                ({"marker": "s", "markerfacecolor": "none", "color": "black", "linestyle": ""},
                 "on the front of blocks and PSNR"),
                ({"marker": "*", "color": "white", "markeredgecolor": "black", "linestyle": ""},
                 "a preset of this model"),
                ({"marker": "s", "markerfacecolor": "none", "color": "#D55E00", "linestyle": ""},
                 "the paper's pair for FLUX.1-dev"),
            )
        ]  # fmt: skip
        figure.legend(handles=marks, loc="outside lower center", ncols=3)
        style.save(figure, path, [_flat(line, best, presets) for line in lines])


def _cell(axes, x: int, y: int, value: float, middle: float, form: str) -> None:
    """The value in its cell; hatched where nothing was measured."""
    if np.isnan(value):
        axes.fill_between(
            [x, x + 1], y, y + 1, facecolor="none", edgecolor="#aaaaaa", hatch="////", linewidth=0
        )
    else:
        ink = "white" if value < middle else "black"
        axes.text(x + 0.5, y + 0.46, format(value, form), ha="center", va="center", fontsize=7, color=ink)


def _frame(axes, x: int, y: int, colour: str, dash: str, width: float) -> None:
    edge = 0.05
    xs = [x + edge, x + 1 - edge, x + 1 - edge, x + edge, x + edge]
    ys = [y + edge, y + edge, y + 1 - edge, y + 1 - edge, y + edge]
    axes.plot(xs, ys, color=colour, linestyle=dash, linewidth=width)


def _flat(line: dict, best: set, presets: dict) -> dict:
    numbers = {k: v for k, v in line.items() if k != "config"}
    return {"tau1": pair(line)[0], "tau2": pair(line)[1], **numbers, "on_front": pair(line) in best,
            "preset": presets.get(pair(line), "")}  # fmt: skip


def answer(lines: list[dict], pictures: list[dict], presets: dict[tuple, str], source: str) -> str:
    """The front, the fastest pairs of a wanted quality, and each metric's best pair, as tables."""
    known_words = lines[0]["words_uncached"]
    heads = ("tau1", "tau2", "blocks", "time", "PSNR dB", "worst", "SSIM", "words", "CLIP-IQA", "preset")
    return "\n".join([
        f"Source: {source}; {len(lines)} pairs, {lines[0]['prompts']} prompts"
        + (f", words read of the uncached {known_words:.1%}." if known_words is not None else "."),
        "", "Pairs that no other beats in both blocks and PSNR:", "",
        *as_table(heads, [_cells(line, presets) for line in on_front(lines)]),
        "", "The fastest pair of a mean PSNR, and each threshold's limit while the other is the least:", "",
        *as_table(("PSNR dB", "tau1 alone", "tau2 alone", "fastest pair", "blocks"), _floors(lines)),
        "", "Where a metric's best pair is not PSNR's: what it gains in that metric, with 95 % intervals",
        f"over prompts. The best of {len(lines)} pairs is picked on the same prompts, which flatters it.", "",
        *as_table(("blocks at least", "metric", "best pair", "PSNR's", "gain"), _best_pairs(lines, pictures)),
    ])  # fmt: skip


def on_front(lines: list[dict]) -> list[dict]:
    """The pairs that no other beats in both blocks and PSNR."""
    return front([p for p in lines if p["psnr"] is not None], lambda p: (p["blocks"], p["psnr"]))


def _floors(lines: list[dict]) -> Iterator[list]:
    rows, columns = axes_of(lines)
    for floor in FLOORS:
        good = [line for line in lines if line["psnr"] is None or line["psnr"] >= floor]
        if not good:
            yield [f"{floor:g}", None, None, None, None]
            continue
        alone1 = max((pair(p)[0] for p in good if pair(p)[1] == columns[0]), default=None)
        alone2 = max((pair(p)[1] for p in good if pair(p)[0] == rows[0]), default=None)
        best = max(good, key=lambda p: p["blocks"])
        yield [f"{floor:g}", alone1, alone2, _pair(best), f"{best['blocks']:.2f}x fewer"]


def _best_pairs(lines: list[dict], pictures: list[dict]) -> Iterator[list]:
    """Each metric's best pair, and what it gains in that metric over PSNR's best, paired by prompt."""
    for ratio in RATIOS:
        fast = [line for line in lines if line["blocks"] >= ratio and line["psnr"] is not None]
        if not fast:
            continue
        usual = _winner(fast, "psnr")
        for name, title in OTHERS.items():
            best = _winner([line for line in fast if line[name] is not None] or [usual], name)
            if best[name] == usual[name]:
                continue
            mine, others = ([r for r in pictures if _is_of(r, line)] for line in (best, usual))
            yield [
                f"{ratio:g}x fewer",
                title,
                _pair(best),
                _pair(usual),
                number(paired(mine, others, name), "+.3f"),
            ]


def _winner(lines: list[dict], name: str) -> dict:
    """The best in a metric; of equals the fastest."""
    return max(lines, key=lambda line: (line[name], line["blocks"]))


def _is_of(row: dict, line: dict) -> bool:
    return row["method"] != "none" and row["config"] == line["config"]


def _pair(line: dict) -> str:
    return "{:g} / {:g}".format(*pair(line))


def _cells(line: dict, presets: dict) -> list[str]:
    tau1, tau2 = pair(line)
    numbers = [("psnr", ".1f"), ("worst_psnr", ".1f"), ("ssim", ".4f"), ("words", ".3f"), ("clip_iqa", ".4f")]
    shown = ["-" if line[name] is None else format(line[name], form) for name, form in numbers]
    return [f"{tau1:g}", f"{tau2:g}", f"{line['blocks']:.2f}x fewer", f"{line['speed_up']:.2f}x", *shown,
            presets.get((tau1, tau2), "")]  # fmt: skip
