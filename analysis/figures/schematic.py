"""The method as a drawing: two stages, two checks, and what a hit leaves out."""

from __future__ import annotations

from pathlib import Path

from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from analysis.figures import style

HIT, MISS, PALE = "#009E73", "#D55E00", "#f4f4f4"


def draw(rows: list[dict], path: Path) -> None:
    with style.figure(style.PAGE, 3.6) as figure:
        axes = figure.subplots()
        axes.set(xlim=(0, 14), ylim=(-0.45, 6.0))
        axes.axis("off")
        for n, row in enumerate(rows):
            _stage(axes, row, x=0.55 + 6.75 * n, forced=n > 0)
        _arrow(axes, (0.0, 4.2), (0.73, 4.2))
        axes.text(0.0, 4.5, "step", fontsize=7)
        _arrow(axes, (13.5, 4.2), (14.0, 4.2))
        axes.text(14.0, 4.5, "output", fontsize=7, ha="right")
        bend = {"color": HIT, "linestyle": "--", "linewidth": 1, "zorder": 5}
        axes.plot([3.8, 3.8, 13.0, 13.0, 12.1], [1.55, 0.12, 0.12, 3.5, 3.5], **bend)  # past the check
        _arrow(axes, (12.2, 3.5), (11.62, 3.5), HIT)
        axes.text(7.2, -0.2, f"a {rows[0]['stage']} hit is a {rows[1]['stage']} hit too, without a check",
                  fontsize=7.5, ha="center", va="center", color=HIT)  # fmt: skip
        style.save(figure, path, rows)


def _stage(axes, row: dict, x: float, forced: bool) -> None:
    """One stage: head, check, and the two ways on."""
    letter, last = row["letter"], row["blocks"] - 1
    frame = FancyBboxPatch(
        (x, 0.45), 6.2, 5.4, boxstyle="round,pad=0.02,rounding_size=0.15", fc=PALE, ec="#bbbbbb"
    )
    axes.add_patch(frame)
    axes.text(x + 0.2, 5.5, f"{row['stage']} stage", fontweight="bold", va="center")
    axes.text(x + 6.0, 5.5, f"{row['blocks']} blocks", fontsize=8, va="center", ha="right")
    _box(axes, x + 0.2, 3.7, 1.5, 1.0, f"{letter}0\nhead,\nalways runs", "white")
    _box(axes, x + 0.2, 2.1, 1.7, 0.9, f"PFS: means of\n{row['window']}×{row['window']} windows", "white")
    _box(axes, x + 2.2, 1.55, 2.1, 1.3, f"relative change\nsince the last miss\n< {row['threshold']}"
         f" ({row['default']:g}) ?", "white")  # fmt: skip
    _box(
        axes,
        x + 2.2,
        4.45,
        2.1,
        0.75,
        f"run {letter}1 ... {letter}{last},\nstore their residual",
        "white",
        MISS,
    )
    _box(axes, x + 2.2, 3.3, 2.1, 0.75, "add the stored\nresidual instead", "white", HIT)
    _arrow(axes, (x + 0.6, 3.7), (x + 0.6, 3.0))
    axes.text(x + 0.7, 3.35, f"residual of\n{row['tokens']}", fontsize=6.5, va="center")
    _arrow(axes, (x + 1.9, 2.5), (x + 2.2, 2.4))
    _arrow(axes, (x + 1.7, 4.35), (x + 2.2, 4.75), MISS)
    _arrow(axes, (x + 1.7, 4.05), (x + 2.2, 3.75), HIT)
    _arrow(axes, (x + 3.0, 2.85), (x + 3.0, 3.3), HIT)
    axes.text(x + 3.08, 3.05, "hit", fontsize=7.5, color=HIT, va="center")
    axes.add_patch(FancyArrowPatch((x + 4.3, 2.2), (x + 4.3, 4.82), arrowstyle="-|>", mutation_scale=7,
                                   connectionstyle="arc3,rad=0.35", color=MISS, linewidth=1))  # fmt: skip
    axes.text(x + 4.83, 2.5, "miss", fontsize=7.5, color=MISS, va="center")
    _arrow(axes, (x + 4.3, 4.95), (x + 6.2, 4.3), MISS)
    _arrow(axes, (x + 4.3, 3.7), (x + 6.2, 4.15), HIT)
    axes.text(x + 0.35, 1.15, f"hit: 1 of {row['blocks']} blocks", fontsize=7.5, color=HIT)
    axes.text(x + 0.35, 0.75, f"miss: all {row['blocks']}", fontsize=7.5, color=MISS)
    if not forced:
        _arrow(axes, (x + 6.25, 4.2), (x + 6.93, 4.2))


def _box(
    axes, x: float, y: float, width: float, height: float, text: str, fill: str, edge: str = "black"
) -> None:
    style = "round,pad=0.02,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, fc=fill, ec=edge, linewidth=1))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=7)


def _arrow(axes, start, end, colour: str = "black") -> None:
    paint = {"arrowstyle": "-|>", "mutation_scale": 7, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, color=colour, linewidth=1, zorder=5, **paint))
