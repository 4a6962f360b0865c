"""Solvers at the same number of evaluations: PSNR to two references."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from analysis.figures import style
from analysis.records.compare import as_table, bootstrap

NAMES = {
    "plan": ("plan", "#B2182B", "s"),
    "plan, default grid": ("plan, default grid", "#F4A582", "s"),
    "plan, ode": ('plan, target="ode"', "#762A83", "D"),
    "euler": ("fewer Euler steps", "#999999", "X"),
    "dpm++ 2m": ("DPM++ 2M", "#0072B2", "^"),
    "unipc": ("UniPC", "#009E73", "v"),
}
REFERENCES = ("uncached", "converged")


def answer(rows: list[dict], source: str) -> str:
    """Mean PSNR to both references, a line for each solver."""
    counts = sorted({row["evaluations"] for row in rows})
    gap = np.mean(list({row["id"]: row["references"] for row in rows}.values()))
    lines = [
        f"Source: {source}. PSNR in dB, to the uncached picture / to the converged one.",
        f"The uncached picture itself lies at {gap:.1f} dB from the converged one.",
        "",
    ]
    table = []
    for name, (label, *_) in NAMES.items():
        cells = []
        for count in counts:
            mine = [row for row in rows if row["solver"] == name and row["evaluations"] == count]
            cells.append(" / ".join(f"{np.mean([row[r] for row in mine]):.1f}" for r in REFERENCES))
        table.append([label, *cells])
    return "\n".join([*lines, *as_table(["solver", *(f"{c} evaluations" for c in counts)], table)])


def draw_figure(rows: list[dict], path: Path) -> None:
    data = []
    with style.figure(style.PAGE, 2.9) as figure:
        for axes, reference, letter in zip(figure.subplots(1, 2), REFERENCES, "ab", strict=True):
            for name, (label, colour, marker) in NAMES.items():
                mine = [row for row in rows if row["solver"] == name]
                counts = sorted({row["evaluations"] for row in mine})
                groups = [[row[reference] for row in mine if row["evaluations"] == c] for c in counts]
                ends = [bootstrap(group) for group in groups]
                means = [end.mean for end in ends]
                bars = np.transpose([(end.mean - end.low, end.high - end.mean) for end in ends])
                axes.errorbar(counts, means, bars, label=label, color=colour, marker=marker)
                data += [{"reference": reference, "solver": label, "evaluations": c, "psnr": m}
                         for c, m in zip(counts, means, strict=True)]  # fmt: skip
            if reference == "converged":
                level = np.mean([row["references"] for row in rows])
                axes.axhline(level, color="black", linestyle="--", linewidth=0.8)
            axes.set(xlabel="evaluations", ylabel="PSNR, dB" if letter == "a" else "")
            style.letter(axes, f"{letter}  against the {reference} picture")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        style.save(figure, path, data)
