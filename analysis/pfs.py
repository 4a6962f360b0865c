"""What pooled feature summaries (PFS) give, and what they do not: against full tensors and other summaries.

    python -m analysis.pfs                        # figure and answer from the shipped records
    python -m analysis.pfs --run --limit 20       # repeat all three measurements
    python -m analysis.pfs --run --device cuda    # the cost of a check on a GPU, too

1. Cost of a check on tensors of FLUX.1-dev's real shapes (1024x1024), and its share of a step. 2. Steadiness
of the measure over steps, and how often a decision flips when the latents get a little noise, at thresholds
that let half of the checks hit. 3. Quality at thresholds re-tuned until every summary hits equally often.
The embedded model has so few tokens that its own window is 1: there full tensors are the default.

Writes pfs.png/.pdf/.csv and the answer in pfs.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean, median

import numpy as np

from analysis import plots
from analysis.intervals import Interval, bootstrap
from analysis.pfs_runs import BLOCKS, NOISES, TARGETS, run, typical_ratios
from analysis.saved import MAYBE, NUMBER, Saved, read_saved
from analysis.summaries import COMPARED, FULL, PAPER
from analysis.trials import parser_of, source_of, write_about

SHIPPED = Path("assets/results/tiny_flux_pfs")
STAGES = ("structure", "detail")
NEEDS = {
    "cost": {"part": str, "device": str, "seconds": list},
    "steadiness": {"id": str, "stage": str, "summary": str, "clean": list, "noisy": dict},
    "decisions": {"id": str, "target": list, "summary": str, "tau1": NUMBER, "tau2": NUMBER, "hits": dict,
                  "blocks_run": int, "blocks": int, "psnr": MAYBE, "ssim": NUMBER},
}  # fmt: skip
NAMES = [str(summary) for summary in COMPARED]
COLOURS = {
    str(s): {"average": "#D55E00", "stride": "#0072B2", "maximum": "#009E73"}[s.kind] for s in COMPARED
}
COLOURS[str(FULL)] = "#000000"


def read(folder: Path) -> dict[str, Saved]:
    """The rows of cost, steadiness and decisions."""
    found = {}
    for name, needs in NEEDS.items():
        paths = [p for p in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz") if p.is_file()]
        if not paths:
            raise FileNotFoundError(f"{folder} holds no {name}.jsonl or {name}.jsonl.gz")
        found[name] = read_saved(paths[:1], needs, unique=("key",))
    return found


# Numbers from rows.


def costs(rows: list[dict]) -> dict[tuple[str, str], dict]:
    """(summary, stage) to milliseconds of a check (median), share of a step, and MiB of its reference."""
    step = BLOCKS * min(min(r["seconds"]) for r in rows if r["part"] == "block")
    return {
        (r["summary"], r["stage"]): {
            "ms": median(r["seconds"]) * 1e3,
            "share": median(r["seconds"]) / step,
            "MiB": r["bytes"] / 2**20,
        }
        for r in rows
        if r["part"] == "check"
    }


def roughness(row: dict) -> float:
    """How unsteadily the measure goes from step to step: standard deviation of its relative changes."""
    values = np.asarray(row["clean"], float)
    return float(np.diff(np.log(np.maximum(values, 1e-9))).std())


def flips(rows: list[dict], stage: str, summary: str, level: str) -> list[float]:
    """By prompt, the share of decisions that noise turns, at the threshold that half of all checks pass."""
    mine = [r for r in rows if (r["stage"], r["summary"]) == (stage, summary)]
    threshold = np.median(np.concatenate([r["clean"] for r in mine]))
    return [
        float(
            np.mean(
                (np.asarray(r["noisy"][level]) < threshold) != (np.asarray(r["clean"]) < threshold)[:, None]
            )
        )
        for r in mine
    ]


def psnr_differences(
    rows: list[dict], target: tuple[float, float], summary: str
) -> tuple[Interval, float] | None:
    """PSNR with `summary` less PSNR with full tensors, by prompt, and how much of it the blocks explain.

    Equal hit counts are met on the prompts that were tuned on; on the others the blocks differ a little. What
    that is worth in dB is read off the slope of full tensors between the targets.
    """
    mine, full = (
        [r for r in rows if (r["summary"], tuple(r["target"])) == (name, target)]
        for name in (summary, str(FULL))
    )
    base = {r["id"]: r for r in full}
    pairs = [(r["psnr"], base[r["id"]]["psnr"]) for r in mine if r["id"] in base]
    found = [a - b for a, b in pairs if a is not None and b is not None]
    if not found:
        return None
    return bootstrap(found), _slope(rows) * (fewer(mine) - fewer(full))


def _slope(rows: list[dict]) -> float:
    """dB for each time fewer blocks, of full tensors over all targets; 0 where there is one target only."""
    points = []
    for target in sorted({tuple(r["target"]) for r in rows}):
        mine = [r for r in rows if (r["summary"], tuple(r["target"])) == (str(FULL), target)]
        psnr = [r["psnr"] for r in mine if r["psnr"] is not None]
        if psnr:
            points.append((fewer(mine), fmean(psnr)))
    (x0, y0), (x1, y1) = (points[0], points[-1]) if points else ((0, 0), (0, 0))
    return (y1 - y0) / (x1 - x0) if x1 != x0 else 0.0


def fewer(rows: list[dict]) -> float:
    """How many times fewer blocks were executed."""
    return sum(r["blocks"] for r in rows) / sum(r["blocks_run"] for r in rows)


# The figure.


def draw(saved: dict[str, Saved], path: Path) -> None:
    cost, steady, decided = (saved[name].rows for name in NEEDS)
    data: list[dict] = []
    y = np.arange(len(NAMES))[::-1]
    with plots.figure(plots.PAGE, 4.6) as figure:
        (a, b, c), (d, e, f) = figure.subplots(2, 3)
        priced = costs(cost)
        for stage, shift, marker in (("structure", 0.12, "o"), ("detail", -0.12, "s")):
            for name, place in zip(NAMES, y, strict=True):
                found = priced.get((name, stage))
                if found:
                    a.plot(found["ms"], place + shift, marker, color=COLOURS[name], label=stage)
                    data.append({"panel": "a", "stage": stage, "summary": name, "value": found["ms"]})
                rough = bootstrap(
                    [roughness(r) for r in steady if (r["stage"], r["summary"]) == (stage, name)]
                )
                _dot(d, rough, place + shift, marker, name)
                data.append({"panel": "d", "stage": stage, "summary": name} | _ends(rough))
                turned = bootstrap(flips(steady, stage, name, str(NOISES[1])))
                _dot(e, turned, place + shift, marker, name)
                data.append({"panel": "e", "stage": stage, "summary": name} | _ends(turned))
        for axes, stage in ((b, "structure"), (c, "detail")):
            for name in NAMES:
                rows = [r["clean"] for r in steady if (r["stage"], r["summary"]) == (stage, name)]
                middle = np.median(np.array(rows), 0)
                dash = {"4": (4, 1), "8": (1, 1), "2": (2, 2)}.get(name.split()[-1], (None, None))
                axes.plot(middle, color=COLOURS[name], label=name, linewidth=1, dashes=dash)
                data += [{"panel": "bc"[stage == "detail"], "stage": stage, "summary": name, "step": n}
                         | {"value": float(v)} for n, v in enumerate(middle)]  # fmt: skip
            axes.set(xlabel="step", ylabel="measure")
            plots.logarithmic(axes.yaxis)
        for target, shift, marker in zip(TARGETS, (0.12, -0.12), "v^", strict=False):
            for name, place in zip(NAMES, y, strict=True):
                found = psnr_differences(decided, target, name)
                if found:
                    at_equal = _less(*found)
                    _dot(f, at_equal, place + shift, marker, name)
                    data.append({"panel": "f", "summary": name, "target": str(target)} | _ends(at_equal))
        for axes in (a, d, e, f):
            axes.set_yticks(y, NAMES if axes in (a, d) else [])
            axes.set_ylim(-0.6, len(NAMES) - 0.4)
        plots.logarithmic(a.xaxis)
        a.set(xlabel="ms (● structure, ■ detail)")
        d.set(xlabel="sd of log step-to-step change")
        e.set(xlabel=f"share, {NOISES[1]:.0%} noise on the latents", xlim=(-0.01, None))
        f.set(
            xlabel="dB against full tensors\n("
            + ", ".join(f"{m} {a:g}/{b:g}" for m, (a, b) in zip("▼▲", TARGETS, strict=False))
            + ")"
        )
        f.axvline(0, color="black", linewidth=0.6)
        figure.legend(*b.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        titles = ("a  time of a check", "b  structure measure", "c  detail measure",
                  "d  unsteadiness", "e  decisions that flip", "f  PSNR at equal blocks")  # fmt: skip
        for axes, title in zip((a, b, c, d, e, f), titles, strict=True):
            plots.letter(axes, title)
        plots.save(figure, path, data)


def _dot(axes, found: Interval, place: float, marker: str, name: str) -> None:
    axes.plot([found.low, found.high], [place, place], color=COLOURS[name], linewidth=0.8)
    axes.plot(found.mean, place, marker, color=COLOURS[name], markersize=4)


def _ends(found: Interval) -> dict[str, float]:
    return {"value": found.mean, "interval_low": found.low, "interval_high": found.high}


# The answer.


def answer(saved: dict[str, Saved], source: str) -> str:
    cost, steady, decided = (saved[name].rows for name in NEEDS)
    priced, ratios = costs(cost), typical_ratios(steady)
    block = next(r for r in cost if r["part"] == "block")
    prompts = [len({r["id"] for r in rows}) for rows in (steady, decided)]
    lines = [
        f"Source: {source}. Cost on {block['device']}, {block['dtype']} ({block['clock']} time), at the",
        f"shapes of FLUX.1-dev; steadiness over {prompts[0]} prompts, decisions over {prompts[1]}.", "",
    ]  # fmt: skip
    heads = ("summary", "check ms (structure + detail)", "of a step", "references MiB", "measure / full",
             "unsteadiness", f"flips at {NOISES[1]:.0%} noise")  # fmt: skip
    targets = [t for t in TARGETS if any(tuple(r["target"]) == t for r in decided)]
    heads += tuple(
        f"{what} as {t[0]}/{t[1]}" for t in targets for what in ("thresholds", "blocks", "PSNR dB")
    )
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in NAMES:
        checks = [priced[name, stage] for stage in STAGES]
        cells = [name, " + ".join(f"{c['ms']:.2f}" for c in checks), f"{sum(c['share'] for c in checks):.3%}"]
        cells += [f"{sum(c['MiB'] for c in checks):.1f}"]
        cells += [" / ".join(f"{ratios[s, name]:.2f}" for s in STAGES)]
        mine = {s: [roughness(r) for r in steady if (r["stage"], r["summary"]) == (s, name)] for s in STAGES}
        cells += [" / ".join(f"{fmean(mine[s]):.3f}" for s in STAGES)]
        cells += [" / ".join(f"{fmean(flips(steady, s, name, str(NOISES[1]))):.1%}" for s in STAGES)]
        for target in targets:
            rows = [r for r in decided if r["summary"] == name and tuple(r["target"]) == target]
            if not rows:
                cells += ["-", "-", "-"]
                continue
            psnr = [r["psnr"] for r in rows if r["psnr"] is not None]
            cells += [f"{rows[0]['tau1']:.3g} / {rows[0]['tau2']:.3g}"]
            cells += [f"{fewer(rows):.2f}x fewer"]
            cells += [f"{fmean(psnr):.1f}" if psnr else "identical"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_verdicts(priced, steady, decided)])


def _verdicts(priced: dict, steady: list[dict], decided: list[dict]) -> list[str]:
    """PFS with the windows of FLUX.1-dev at 1024x1024 against full tensors, in words."""
    full, paper = str(FULL), str(PAPER)
    whole, pooled = (sum(priced[name, s]["ms"] for s in STAGES) for name in (full, paper))
    shares = [sum(priced[name, s]["share"] for s in STAGES) for name in (full, paper)]
    held = [sum(priced[name, s]["MiB"] for s in STAGES) for name in (full, paper)]
    cheapest = min(NAMES, key=lambda name: sum(priced[name, s]["ms"] for s in STAGES))
    faster = (
        f"{whole / pooled:.1f} times as fast" if pooled < whole else f"{pooled / whole:.1f} times as slow"
    )
    yield (
        f"- Cost: a check with PFS ({paper}) is {faster} as one on full tensors: {shares[0]:.3%} of a step "
        f"becomes {shares[1]:.3%}. The cheapest is {cheapest}. References take {held[1]:.1f} instead of "
        f"{held[0]:.1f} MiB."
    )
    for stage in STAGES:
        mine, base = (
            {r["id"]: roughness(r) for r in steady if (r["stage"], r["summary"]) == (stage, name)}
            for name in (paper, full)
        )
        rough = bootstrap([mine[i] - base[i] for i in mine])
        turns = [flips(steady, stage, name, str(NOISES[1])) for name in (paper, full)]
        turned = bootstrap([a - b for a, b in zip(*turns, strict=True)])
        yield (
            f"- Steadiness of the {stage} measure: with PFS it is "
            f"{_more(rough, 'unsteadier', 'steadier')} from step to step ({_signed(rough, '.3f')}),\n  and "
            f"noise flips {_more(turned, 'more', 'fewer')} decisions ({_signed(turned, '.1%')})."
        )
    for target in TARGETS:
        found = psnr_differences(decided, target, paper)
        if found:
            difference, explained = found
            rest = _less(difference, explained)
            yield (
                f"- Quality at the hit counts of {target[0]:g}/{target[1]:g} on full tensors: with PFS "
                f"{difference.mean:+.2f} dB, of which {explained:+.2f} dB because it executes\n  "
                f"other numbers of blocks; the rest, {_signed(rest, '.2f')} dB, says that PFS decides "
                f"{_more(rest, 'better', 'worse')}."
            )
    yield "- Thresholds do not carry over from one summary to another: see the column of the measure's ratio."


def _less(found: Interval, value: float) -> Interval:
    return Interval(found.mean - value, found.low - value, found.high - value)


def _signed(found: Interval, form: str) -> str:
    return f"{found.mean:+{form}} [{found.low:+{form}}, {found.high:+{form}}]"


def _more(found: Interval, above: str, below: str) -> str:
    return above if found.low > 0 else below if found.high < 0 else f"neither {above} nor {below}"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "pfs")
    parser.add_argument("--records", type=Path, default=SHIPPED, help="folder with the three record files")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        folder = args.records
        if args.run:
            folder = run(args)
            write_about(folder, "pfs", args)
        saved = read(folder)
        draw(saved, args.out / "pfs")
        plots.write_words(args.out / "pfs.md", answer(saved, source_of(folder)))
        return max(found.exit_code() for found in saved.values())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
