"""What freezing each stage does: errors by frequency and by span, the pictures, and both as tables."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import numpy as np
from PIL import Image

from analysis.ablations.freeze import STAGES
from analysis.figures import style
from analysis.measures.spectrum import BANDS, LOW
from analysis.records.compare import Interval, as_table, bootstrap, mean, number, paired

COLOURS = {"structure": style.STRUCTURE, "detail": style.DETAIL, "both": style.BOTH}
WINDOWS = 5  # spans that have no step in common; the others reach to the end and hold each other
CHECKS = {"word": "word read", "shape": "shape", "sign": "sign colour", "texture": "texture"}


def spans(steps: int) -> list[tuple[int, int]]:
    """Frozen steps [first, last): five windows of a fifth of the run, and three that last to the end."""
    fifth = max(1, steps // 5)
    windows = [(max(1, n * fifth), (n + 1) * fifth) for n in range(5)]
    return windows + [(max(1, steps * share // 10), steps) for share in (6, 4, 2)]


def disjoint(
    everywhere: list[tuple[int, int]], steps: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The windows, which have no step in common and count as so many observations, and the long spans."""
    windows = [span for span in everywhere if span in spans(steps)[:WINDOWS]]
    return windows, [span for span in everywhere if span not in windows]


def told(span: tuple[int, int]) -> str:
    return f"{span[0]}-{span[1] - 1}"


def of(rows: list[dict], stage: str, span: tuple[int, int]) -> list[dict]:
    return [r for r in rows if r["stage"] == stage and (r["first"], r["last"]) == span]


def draw_spectra(
    rows: list[dict], uncached: list[dict], everywhere: list[tuple[int, int]], path: Path
) -> None:
    """Above: relative error by frequency, in a choice of spans. Below: errors and checks in all of them."""
    windows = everywhere[:5:2] + everywhere[5::2]
    data, frequency = [], (np.arange(BANDS) + 0.5) / BANDS
    with style.figure(style.PAGE, 4.1) as figure:
        above, below = figure.subfigures(2, 1, height_ratios=(1.05, 1))
        panels = above.subplots(1, len(windows), sharex=True, sharey=True, squeeze=False)[0]
        for axes, span in zip(panels, windows, strict=True):
            for stage in STAGES:
                spectra = np.array([r["spectrum"] for r in of(rows, stage, span)])
                middle = np.exp(np.log(spectra + 1e-9).mean(0))
                low, high = np.percentile(spectra, (25, 75), axis=0)
                line = "--" if stage == "both" else "-"
                axes.plot(frequency, middle, line, color=COLOURS[stage], label=f"{stage} frozen")
                if stage != "both":
                    axes.fill_between(frequency, low, high, color=COLOURS[stage], alpha=0.2, linewidth=0)
                for n, value in enumerate(middle):
                    data.append({"part": "spectrum", "stage": stage, "first": span[0], "last": span[1]}
                                | {"frequency": frequency[n], "value": float(value)})  # fmt: skip
            axes.axvline(LOW, color="black", linewidth=0.6, linestyle=":")
            axes.set(yscale="log", xlim=(0, 1))
            axes.set_title(f"steps {told(span)}")
        panels[0].set_ylabel("error / own power")
        panels[len(windows) // 2].set_xlabel("spatial frequency (1: Nyquist; dotted: low | high)")
        handles, labels = panels[0].get_legend_handles_labels()
        dotted = panels[0].plot([], [], color="black", linestyle=":", linewidth=0.8)
        labels.append("uncached (of the shares)")
        figure.legend(handles + dotted, labels, loc="outside lower center", ncols=4)
        names = {"low": "error, low", "high": "error, high"} | CHECKS
        shown = {k: v for k, v in names.items() if all(r[k] is not None for r in rows)}
        for axes, (name, title) in zip(
            below.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True
        ):
            for shift, stage in enumerate(STAGES):
                found = [bootstrap([r[name] for r in of(rows, stage, span)]) for span in everywhere]
                x = np.arange(len(everywhere)) + (shift - 1) * 0.2
                means = np.array([i.mean for i in found])
                ends = np.abs(np.array([[i.low for i in found], [i.high for i in found]]) - means)
                paint = {"color": COLOURS[stage], "marker": "osD"[shift], "capsize": 1, "markersize": 3}
                axes.errorbar(x, means, ends, linestyle="none", elinewidth=0.8, **paint)
                for span, i in zip(everywhere, found, strict=True):
                    data.append({"part": name, "stage": stage, "first": span[0], "last": span[1]}
                                | {"value": i.mean, "low": i.low, "high": i.high})  # fmt: skip
            axes.set_xticks(range(len(everywhere)), [told(span) for span in everywhere], rotation=90)
            axes.axvline(len(disjoint(everywhere, rows[0]["steps"])[0]) - 0.5, color="#bbbbbb", linewidth=0.6)
            axes.set_title(title)
            reference = [r[name] for r in uncached if r[name] is not None]
            if name in CHECKS and reference:
                level = fmean(reference)
                axes.axhline(level, color="black", linewidth=0.8, linestyle=":", zorder=4)
                data.append({"part": name, "stage": "none", "value": level})
            if name in ("low", "high"):
                axes.set_yscale("log")
            else:
                axes.set(ylim=(-0.05, 1.05), ylabel="share" if name == "word" else "")
                if name != "word":
                    axes.set_yticklabels([])
        style.save(figure, path, data)


def draw_pictures(folder: Path, windows: list[tuple[int, int]], path: Path) -> bool:
    """The kept prompt with each stage frozen, and the difference to the uncached picture, four times."""
    reference = folder / "none-1-1.png"  # as `run` names it, whichever spans are complete
    wanted = [folder / f"{stage}-{a}-{b}.png" for stage in STAGES[:2] for a, b in windows]
    if not all(p.is_file() for p in [reference, *wanted]):
        return False
    uncached = np.asarray(Image.open(reference).convert("RGB"), float)
    data = []
    with style.figure(style.PAGE, 4 * style.PAGE / (len(windows) + 1.2)) as figure:
        grid = figure.subplots(4, len(windows) + 1)
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        grid[0, 0].imshow(uncached.astype(np.uint8))
        grid[0, 0].set_title("uncached")
        for y, stage in enumerate(STAGES[:2]):
            for x, (a, b) in enumerate(windows, 1):
                name = f"{stage}-{a}-{b}.png"
                picture = np.asarray(Image.open(folder / name).convert("RGB"), float)
                grid[2 * y, x].imshow(picture.astype(np.uint8))
                grid[2 * y + 1, x].imshow(np.clip(np.abs(picture - uncached) * 4, 0, 255).astype(np.uint8))
                data.append({"stage": stage, "first": a, "last": b, "picture": name})
                if y == 0:
                    grid[0, x].set_title(told((a, b)))
            grid[2 * y, 1].set_ylabel(f"{stage}\nfrozen", color=COLOURS[stage], fontweight="bold")
            grid[2 * y + 1, 1].set_ylabel("difference\n×4")
        style.save(figure, path, data)
    return True


def leaning(rows: list[dict], stage: str, span: tuple[int, int]) -> dict[str, float]:
    """log2 of high- over low-frequency relative error, by prompt: above 0, detail suffers more."""
    return {r["id"]: float(np.log2((r["high"] + 1e-9) / (r["low"] + 1e-9))) for r in of(rows, stage, span)}


def answer(rows: list[dict], uncached: list[dict], everywhere: list[tuple[int, int]], source: str) -> str:
    """Does L1 stand for structure and L2 for detail? Three tables."""
    heads = ("frozen", "steps", "PSNR dB", "low error", "high error", "log2 high/low", *CHECKS.values())
    table, between, changes = [], [], []
    if uncached:
        table.append(["none", "-", "identical", "0", "0", "-", *(_mean(uncached, n, ".2f") for n in CHECKS)])
    for span in everywhere:
        for stage in STAGES:
            mine = of(rows, stage, span)
            cells = [stage, told(span), _mean(mine, "psnr", ".1f")]
            cells += [_mean(mine, "low", ".2g"), _mean(mine, "high", ".2g")]
            cells += [f"{fmean(leaning(rows, stage, span).values()):+.2f}"]
            table.append([*cells, *(_mean(mine, name, ".2f") for name in CHECKS)])
            lost = [paired([r for r in mine if uncached], uncached, name) for name in CHECKS]
            if any(found and found.shows_difference for found in lost):
                changes.append([stage, told(span), *(number(found, "+.2f") for found in lost)])
        structure, detail = leaning(rows, "structure", span), leaning(rows, "detail", span)
        found = bootstrap([structure[i] - detail[i] for i in structure if i in detail])
        gaps = [gap(rows, span, "psnr"), gap(rows, span, "psnr", "both", "detail")]
        kind = "window" if span in spans(rows[0]["steps"])[:WINDOWS] else "to the end, overlaps"
        between.append([told(span), f"{found:+.2f}", *(number(g, "+.1f") for g in gaps), kind])
    claim = ("steps", "log2 high/low", "PSNR dB", "PSNR dB, both less detail", "span")
    lines = [
        f"Source: {source}, {len({r['id'] for r in rows})} prompts.", "", *as_table(heads, table), "",
        "Structure frozen less detail frozen: log2(high/low) is below 0 if structure is L1's and detail",
        "L2's. In brackets: 95 % bootstrap intervals over prompts.", "", *as_table(claim, between),
    ]  # fmt: skip
    if changes:
        lines += [
            "",
            "Checks less the uncached pictures', where one changes by more than chance:",
            "",
        ]
        lines += as_table(("frozen", "steps", *CHECKS.values()), changes)
    return "\n".join(lines)


def _mean(rows: list[dict], name: str, form: str) -> str | None:
    return number(mean(rows, name), form)


def gap(
    rows: list[dict], span: tuple[int, int], name: str, one: str = "structure", other: str = "detail"
) -> Interval | None:
    """The value with stage `one` frozen less that with stage `other` frozen, paired by prompt."""
    return paired(of(rows, one, span), of(rows, other, span), name)
