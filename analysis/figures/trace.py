"""The measure of every step against its threshold, of one request and of all."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from analysis.figures import style
from analysis.records.compare import as_table
from analysis.records.traces import OUTCOMES, stage_lines, thresholds_of


def draw_one(row: dict, path: Path) -> None:
    """One request: a panel for each stage, and a strip below it for the steps without a measure."""
    lines, data = stage_lines(row), []
    with style.figure(style.PAGE, 2.9) as figure:
        grid = figure.subplots(2, len(lines), sharex=True, height_ratios=(7, 1), squeeze=False)
        for n, (stage, line) in enumerate(lines.items()):
            axes, strip = grid[:, n]
            measures, outcomes = np.array(line["measures"], float), np.array(list(line["outcomes"]))
            steps, counts = np.arange(len(outcomes)), Counter(line["outcomes"])
            seen = np.isfinite(measures)
            axes.plot(steps[seen], measures[seen], color="#777777", linewidth=0.7, zorder=1)
            limit = thresholds_of(line)
            if np.isfinite(limit).any():
                axes.plot(steps, limit, "--", color="black", linewidth=0.9, label="threshold")
            for code, (name, colour, marker) in OUTCOMES.items():
                mine = outcomes == code
                paint = {"color": colour, "markersize": 5 if marker == "|" else 3.5}
                axes.plot(steps[mine & seen], measures[mine & seen], marker, **paint)
                strip.plot(steps[mine & ~seen], 0 * steps[mine & ~seen], marker, **paint)
                if mine.any():
                    axes.plot([], [], marker, label=f"{name} ({counts[code]})", **paint)
            data += [{"stage": stage, "step": int(s), "measure": float(m) if np.isfinite(m) else "",
                      "threshold": float(t) if np.isfinite(t) else "", "outcome": OUTCOMES[o][0]}
                     for s, m, t, o in zip(steps, measures, limit, outcomes, strict=True)]  # fmt: skip
            label = "error of the forecasts before" if stage == "model" else "relative change"
            axes.set(ylabel=label if n == 0 else "", xlim=(-1, len(steps)))
            if seen.any():
                style.logarithmic(axes.yaxis)
            strip.set(xlabel="step", ylim=(-1, 1))
            strip.set_yticks([0], ["not compared"] if n == 0 else [""])
            strip.tick_params(left=False)
            strip.legend(
                *axes.get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, -1.7), ncols=3
            )
            style.letter(axes, f"{'abcd'[n % 4]}  {stage}")
        style.save(figure, path, data)


def draw_all(rows: list[dict], path: Path) -> None:
    """All requests: the measure with bands above, the shares of outcomes below."""
    names, data = list(stage_lines(rows[0])), []
    with style.figure(style.PAGE, 3.6) as figure:
        grid = figure.subplots(2, len(names), sharex=True, height_ratios=(2, 1), squeeze=False)
        for n, stage in enumerate(names):
            lines = [stage_lines(row)[stage] for row in rows]
            measures = np.array([line["measures"] for line in lines], float)
            outcomes = np.array([list(line["outcomes"]) for line in lines])
            steps = np.arange(measures.shape[1])
            seen = np.isfinite(measures).sum(0) >= min(3, len(lines))  # of fewer there is no band
            bands = np.full((5, len(steps)), np.nan)
            above, below = grid[:, n]
            if seen.any():
                bands[:, seen] = np.nanpercentile(measures[:, seen], (5, 25, 50, 75, 95), axis=0)
                colour = (style.STRUCTURE, style.DETAIL)[n % 2]
                # A step is as wide as its share below; one that compared nothing stays empty.
                edges, wide = np.repeat(steps, 2) + np.tile((-0.5, 0.5), len(steps)), np.repeat(bands, 2, 1)
                paint = {"color": colour, "linewidth": 0}
                above.fill_between(edges, wide[0], wide[4], alpha=0.2, label="nine tenths", **paint)
                above.fill_between(edges, wide[1], wide[3], alpha=0.4, label="half", **paint)
                above.plot(edges, wide[2], color=colour, label="median of those compared")
                style.logarithmic(above.yaxis)
            limit = thresholds_of(lines[0])
            if np.isfinite(limit).any():
                above.plot(steps, limit, "--", color="black", linewidth=0.9, label="threshold")
            above.set_ylabel("error of the forecasts before" if names[n] == "model" else "relative change")
            style.letter(above, f"{'abcd'[n % 4]}  {stage}, {len(lines)} requests")
            floor = np.zeros(len(steps))
            for code, (name, colour, _) in OUTCOMES.items():
                share = (outcomes == code).mean(0)
                below.bar(steps, share, bottom=floor, width=1.0, color=colour, label=name, linewidth=0)
                floor += share
                data += [
                    {"stage": stage, "step": int(s), "part": name, "value": float(v)}
                    for s, v in enumerate(share)
                ]
            below.set(xlabel="step", ylabel="share", ylim=(0, 1), xlim=(-0.5, len(steps) - 0.5))
            for name, values in zip(("5 %", "25 %", "50 %", "75 %", "95 %"), bands, strict=True):
                data += [{"stage": stage, "step": int(s), "part": f"measure {name}", "value": float(v)}
                         for s, v in zip(steps[seen], values[seen], strict=True)]  # fmt: skip
        marks = [axes.get_legend_handles_labels() for axes in grid[:, 0]]
        handles, labels = (a + b for a, b in zip(*marks, strict=True))
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        style.save(figure, path, data)


def answer(rows: list[dict], label: str, source: str) -> str:
    """Where in the run the hits are."""
    table = []
    for stage in stage_lines(rows[0]):
        outcomes = np.array([list(stage_lines(row)[stage]["outcomes"]) for row in rows])
        steps = outcomes.shape[1]
        means = [(outcomes == code).sum(1).mean() for code in OUTCOMES]
        thirds = [(part != "M").mean() for part in np.array_split(outcomes, min(3, steps), axis=1)]
        table.append([stage, steps, *(f"{m:.1f}" for m in means), ", ".join(f"{t:.0%}" for t in thirds)])
    heads = ("stage", "steps", "hits", "forced", "misses", "hits in each third of the run")
    return "\n".join([f"Source: {source}; {label}, {len(rows)} requests.", "", *as_table(heads, table)])
