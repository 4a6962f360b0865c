"""Quality against compute: three panels of our own runs, one of published figures, and tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from analysis.figures import style
from analysis.records.compare import ALONE, METRICS, as_table, at, front, number

COSTS = {
    "blocks_ratio": "blocks executed, times fewer",
    "speed_up": "time of the call, times shorter",
    "mebibytes": "cache held, MiB",
}
CONTROL = "fewer_steps"
RATIOS = (2.0, 3.0, 4.0, 5.0, 6.0)
OURS = ("plan", "h2cache")


FEW, SPEEDS = ("plan", "plan file=none", "h2cache", CONTROL), (2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)


def _in_order(found: list[dict]) -> list[str]:
    """The lines: ours first, the control last."""

    def place(line: str) -> tuple:
        ours = [name for name in OURS if line.startswith(name)]
        return (OURS.index(ours[0]) if ours else len(OURS), line == CONTROL, line)

    return sorted({p["line"] for p in found}, key=place)


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
    axes.set(xlabel="time, times shorter (as printed)", ylabel="CLIP-IQA (variant not given)")
    style.letter(axes, "d  published: FLUX.1-dev, CUTE80")


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
