"""Pooled feature summaries against full tensors and other summaries: six panels, and tables."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import numpy as np

from analysis.ablations.pfs import NOISES, REFERENCE_GAP, typical_ratios
from analysis.ablations.summaries import COMPARED, FULL, PAPER
from analysis.figures import style
from analysis.records.compare import Interval, as_table, bootstrap, number, paired
from analysis.records.pfs import (
    NEEDS,
    STAGES,
    costs,
    fewer,
    flips,
    own_hits,
    psnr_differences,
    roughness,
    targets_of,
    undetermined,
)
from analysis.records.saved import Saved

SHAPES = {"▼": "v", "▲": "^", "◆": "D"}  # of the targets: in words and in the figure
MARKS = {"structure": "o", "detail": "s"}
COLOURS = {
    str(s): {"average": "#D55E00", "stride": "#0072B2", "maximum": "#009E73"}[s.kind] for s in COMPARED
}


COLOURS[str(FULL)] = "#000000"


def draw(saved: dict[str, Saved], names: list[str], path: Path) -> None:
    cost, steady, decided = (saved[name].rows for name in NEEDS)
    data: list[dict] = []
    y = np.arange(len(names))[::-1]
    targets = dict(zip(targets_of(decided), SHAPES, strict=False))
    with style.figure(style.PAGE, 4.6) as figure:
        (a, b, c), (d, e, f) = figure.subplots(2, 3)
        priced = costs(cost)
        for (stage, marker), shift in zip(MARKS.items(), (0.12, -0.12), strict=True):
            for name, place in zip(names, y, strict=True):
                found = priced[name, stage]
                a.plot(found["ms"], place + shift, marker, color=COLOURS[name], label=stage)
                data.append({"panel": "a", "stage": stage, "summary": name, "value": found["ms"]})
                rough = bootstrap(
                    [roughness(r) for r in steady if (r["stage"], r["summary"]) == (stage, name)]
                )
                _dot(d, rough, place + shift, marker, name)
                data.append({"panel": "d", "stage": stage, "summary": name} | _ends(rough))
                for noise, fill in zip(NOISES, ("white", None), strict=True):
                    turned = bootstrap(flips(steady, stage, name, str(noise)))
                    _dot(e, turned, place + shift, marker, name, fill)
                    data.append(
                        {"panel": "e", "stage": stage, "summary": name, "noise": noise} | _ends(turned)
                    )
        for axes, stage in ((b, "structure"), (c, "detail")):
            for name in names:
                rows = [r["clean"] for r in steady if (r["stage"], r["summary"]) == (stage, name)]
                middle = np.median(np.array(rows), 0)
                dash = {"4": (4, 1), "8": (1, 1), "2": (2, 2)}.get(name.split()[-1], (None, None))
                steps = np.arange(len(middle)) + REFERENCE_GAP  # the first that has a reference
                axes.plot(steps, middle, color=COLOURS[name], label=name, linewidth=1, dashes=dash)
                data += [{"panel": "bc"[stage == "detail"], "stage": stage, "summary": name, "step": int(n)}
                         | {"value": float(v)} for n, v in zip(steps, middle, strict=True)]  # fmt: skip
            axes.set(xlabel="step", ylabel="measure")
            style.logarithmic(axes.yaxis)
        for (target, shape), shift in zip(targets.items(), (0.22, 0, -0.22), strict=False):
            for name, place in zip(names, y, strict=True):
                found = psnr_differences(decided, target, name)
                if found:
                    at_equal = _less(*found)
                    _dot(f, at_equal, place + shift, SHAPES[shape], name)
                    data.append({"panel": "f", "summary": name, "target": str(target)} | _ends(at_equal))
        for axes in (a, d, e, f):
            axes.set_yticks(y, names if axes in (a, d) else [])
            axes.set_ylim(-0.6, len(names) - 0.4)
        style.logarithmic(a.xaxis)
        a.set(xlabel="ms (● structure, ■ detail)")
        d.set(xlabel="sd of log step-to-step change")
        e.set(xlabel="share, under {:.0%} (hollow)\nand {:.0%} noise".format(*NOISES), xlim=(-0.01, None))
        told = [f"{shape} {a:g}/{b:g}" for (a, b), shape in targets.items()]
        f.set(xlabel="\n".join(["dB against full tensors", "  ".join(told[:2]), *told[2:]]))
        f.axvline(0, color="black", linewidth=0.6)
        figure.legend(*b.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        titles = ("a  time of a check", "b  structure measure", "c  detail measure",
                  "d  unsteadiness", "e  decisions that flip", "f  PSNR at equal blocks")  # fmt: skip
        for axes, title in zip((a, b, c, d, e, f), titles, strict=True):
            style.letter(axes, title)
        style.save(figure, path, data)


def _dot(axes, found: Interval, place: float, marker: str, name: str, fill: str | None = None) -> None:
    axes.plot([found.low, found.high], [place, place], color=COLOURS[name], linewidth=0.8)
    inside = {"markerfacecolor": fill or COLOURS[name]}
    axes.plot(found.mean, place, marker, color=COLOURS[name], markersize=4, **inside)


def _ends(found: Interval) -> dict[str, float]:
    return {"value": found.mean, "interval_low": found.low, "interval_high": found.high}


def answer(saved: dict[str, Saved], names: list[str], source: str) -> str:
    cost, steady, decided = (saved[name].rows for name in NEEDS)
    priced, ratios = costs(cost), typical_ratios(steady)
    block = next(r for r in cost if r["part"] == "block")
    prompts = [len({r["id"] for r in rows}) for rows in (steady, decided)]
    lines = [
        f"Source: {source}. Cost on {block['device']}, {block['dtype']} ({block['clock']} time), at the",
        f"shapes of FLUX.1-dev; steadiness over {prompts[0]} prompts, decisions over {prompts[1]}.", "",
    ]  # fmt: skip
    heads = ("summary", "check ms (structure + detail)", "of a step", "references MiB", "measure / full",
             "unsteadiness", *(f"flips at {noise:.0%} noise" for noise in NOISES))  # fmt: skip
    table = []
    for name in names:
        checks = [priced[name, stage] for stage in STAGES]
        cells = [name, " + ".join(f"{c['ms']:.2f}" for c in checks), f"{sum(c['share'] for c in checks):.3%}"]
        cells += [f"{sum(c['MiB'] for c in checks):.1f}"]
        cells += [" / ".join(f"{ratios[s, name]:.2f}" for s in STAGES)]
        mine = {s: [roughness(r) for r in steady if (r["stage"], r["summary"]) == (s, name)] for s in STAGES}
        cells += [" / ".join(f"{fmean(mine[s]):.3f}" for s in STAGES)]
        for noise in NOISES:
            cells += [" / ".join(f"{fmean(flips(steady, s, name, str(noise))):.1%}" for s in STAGES)]
        table.append(cells)
    lines += ["Pairs of numbers are structure / detail.", "", *as_table(heads, table)]
    for target in targets_of(decided):
        lines += ["", *_decided(decided, target, names)]
    if str(PAPER) in names:
        lines += ["", *_pfs_and_full(steady, decided)]
    return "\n".join(lines)


def _decided(decided: list[dict], target: tuple[float, float], names: list[str]) -> list[str]:
    """The table of one target: thresholds that hit as often, and what came of them."""
    unknown = undetermined(decided, target)
    table = []
    for name in names:
        rows = [r for r in decided if r["summary"] == name and tuple(r["target"]) == target]
        if not rows:
            continue
        psnr = [r["psnr"] for r in rows if r["psnr"] is not None]
        cells = [name]
        for stage, tau in zip(STAGES, ("tau1", "tau2"), strict=True):
            tuned = stage not in unknown or name == str(FULL)
            cells.append(f"{rows[0][tau]:.3g}" if tuned else "not determined")
        cells += [" / ".join(f"{hits:.1f}" for hits in own_hits(rows).values()), f"{fewer(rows):.2f}x fewer"]
        table.append([*cells, f"{fmean(psnr):.1f}" if psnr else "identical"])
    heads = ("summary", "tau1", "tau2", "hits of its own", "blocks", "PSNR dB")
    return [
        f"Tuned to the hits of {target[0]:g} / {target[1]:g} on full tensors:",
        "",
        *as_table(heads, table),
    ]


def _pfs_and_full(steady: list[dict], decided: list[dict]) -> list[str]:
    """PFS with the windows of FLUX.1-dev at 1024x1024 less full tensors, prompt by prompt, as two tables."""
    full, paper = str(FULL), str(PAPER)
    unsteady, quality = [], []
    for stage in STAGES:
        mine, base = (
            [
                {"id": r["id"], "rough": roughness(r)}
                for r in steady
                if (r["stage"], r["summary"]) == (stage, name)
            ]
            for name in (paper, full)
        )
        turns = [flips(steady, stage, name, str(NOISES[1])) for name in (paper, full)]
        turned = bootstrap([a - b for a, b in zip(*turns, strict=True)])
        unsteady.append([stage, number(paired(mine, base, "rough"), "+.3f"), f"{turned:+.1%}"])
    for target in targets_of(decided):
        found = psnr_differences(decided, target, paper)
        if found:
            cells = [f"{found[0]:+.2f}", f"{found[1]:+.2f}", f"{_less(*found):+.2f}"]
            unknown = ", ".join(undetermined(decided, target)) or None
            quality.append(["{:g} / {:g}".format(*target), *cells, unknown])
    heads = ("stage", "unsteadiness", f"flips at {NOISES[1]:.0%} noise")
    tuned = ("tuned to", "PSNR dB", "of it by other blocks", "by other decisions", "threshold not determined")
    return [f"PFS ({paper}) less full tensors, with 95 % bootstrap intervals over prompts:", "",
            *as_table(heads, unsteady), "", *as_table(tuned, quality)]  # fmt: skip


def _less(found: Interval, value: float) -> Interval:
    return Interval(found.mean - value, found.low - value, found.high - value)
