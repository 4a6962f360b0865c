"""The comparison on three models in tables: claims, methods, numbers of steps."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, median

from analysis.records import store
from analysis.records.claims import (
    CLAIMS,
    FEWER,
    GRID,
    RATIOS,
    SEPARATION,
    TUNED,
    Values,
    name,
    stages_differ,
    values,
)
from analysis.records.compare import as_table, bootstrap, groups, mean, number, times_fewer
from analysis.records.models import Rows

RIGHT = {"tiny_flux": "words read", "tiny_wan": "everything right", "tiny_dit": "class right"}


def claims_table(models: dict[str, Rows], frozen: dict[str, Rows]) -> list[str]:
    """A row for each claim, a column for each model."""

    def cell(verdict: str, text: str) -> str:
        return f"**{verdict}**" + (f" ({text})" if text else "")

    found = [[claim, *(cell(*ask(rows)) for rows in models.values())] for claim, ask in CLAIMS.items()]
    found.append([SEPARATION, *(cell(*stages_differ(frozen[model])) for model in models)])
    return as_table(["at 5x fewer blocks", *models], found)


def mean_of(found: Values, form: str) -> str | None:
    return number(bootstrap(list(found.values())) if found else None, form)


def methods_table(model: str, rows: Rows) -> list[str]:
    """PSNR at each ratio, and at the first what is right, the flicker, seconds and bytes."""
    base = {r["id"]: r for r in rows if r["method"] == "none"}
    video = any(r.get("flicker") is not None for r in rows)
    first = RATIOS[0]
    heads = ["method", *(f"PSNR at {r:g}x, dB" for r in RATIOS), RIGHT[model]]
    heads += ["flicker, levels"] * video + ["time", "cache, MiB"]
    uncached = [None] * len(RATIOS) + [f"{mean(base.values(), 'right'):.1%}"] + [None] * video
    cells = [["uncached", *uncached, "1x", None]]
    lines = groups([r for r in rows if r["method"] != "none"], "line")
    order = {line: values(rows, line, first) for line in lines}
    for line in sorted(order, key=lambda line: -fmean(order[line].values()) if order[line] else 0):
        right, faster = (values(rows, line, first, what) for what in ("right", "faster"))
        row = [name(line), *(mean_of(values(rows, line, ratio), ".1f") for ratio in RATIOS)]
        row.append(f"{fmean(right.values()):.1%}" if right else None)
        row += [mean_of(values(rows, line, first, "flicker"), ".2f")] if video else []
        row.append(f"{median(faster.values()):.2f}x" if faster else None)
        held = max(r["bytes_held"] for r in rows if r["line"] == line)
        cells.append([*row, f"{held / 2**20:.2f}"])
    return as_table(heads, cells)


def steps_tables() -> list[str]:
    """What the models' own evaluations say about numbers of steps, uncached."""
    lines = []
    if flux := store.read_json(Path("assets/tiny_flux/steps.json")):
        cells = [
            [s, f"{r['words']:.1%}", f"{r['texture']:.1%}", f"{r['fine']:.2f}"]
            for s, r in flux["by_steps"].items()
        ]
        lines += ["", f"tiny_flux, {flux['summary']['images']} signs:", ""]
        lines += as_table(("steps", "words read", "texture", "finest power, of true signs"), cells)
    wan = store.read_json(Path("assets/tiny_wan/evaluation.json")) or {"summaries": {}}
    cells = [[s, f"{r['all']:.1%}", f"{r['flicker_levels']:.2f}"] for s, r in wan["summaries"].items()]
    lines += ["", "tiny_wan, 64 clips:", ""]
    lines += as_table(("steps", "everything right", "flicker, levels"), cells)
    dit = store.read_json(Path("assets/tiny_dit/evaluation.json")) or {"by_steps": {}}
    cells = [[s, f"{r['right']:.1%}", f"{r['frechet']:.2f}"] for s, r in dit["by_steps"].items()]
    return [*lines, "", "tiny_dit, 200 digits:", "", *as_table(("steps", "class right", "Fréchet"), cells)]


def samplers_table(rows: Rows) -> list[str]:
    """The plan's default grid under other samplers and numbers of steps, at each of its speeds."""
    heads = ["sampler, steps", "at", "plan, default grid", "plan, tuned", "next method", "fewer steps"]
    cells = []
    for (sampler, steps), mine in groups(rows, ("sampler", "steps")).items():
        base = {row["id"]: row for row in mine if row["method"] == "none"}
        others = sorted({r["line"] for r in mine if r["method"] not in ("none", "plan", FEWER)})
        for own in groups([r for r in mine if r["line"] == GRID], "label").values():
            ratio = times_fewer(own, [base[r["id"]] for r in own])
            known = {line: found for line in others if (found := values(mine, line, ratio))}
            best = max(known, key=lambda line: fmean(known[line].values()), default=None)
            row = [f"{sampler}, {steps}", f"{ratio:.3g}x"]
            row += [mean_of(values(mine, line, ratio), ".1f") for line in (GRID, TUNED)]
            row.append(best and f"{mean_of(known[best], '.1f')} {name(best)}")
            cells.append([*row, mean_of(values(mine, FEWER, ratio), ".1f")])
    return as_table(heads, cells)


def right_table(rows: Rows) -> list[str]:
    """Of the contestants whose words were read: the share that is right."""
    cells = []
    for (sampler, steps), mine in groups(rows, ("sampler", "steps")).items():
        read = groups([r for r in mine if r["right"] is not None], "label")
        cells += [[f"{sampler}, {steps}", label, f"{mean(own, 'right'):.1%}"] for label, own in read.items()]
    return as_table(["sampler, steps", "contestant", "words read"], cells)
