"""What pooled feature summaries (PFS) give, and what they do not: against full tensors and other summaries.

    python -m analysis.pfs                        # figure and answer from the shipped records
    python -m analysis.pfs --run --limit 20       # repeat all three measurements
    python -m analysis.pfs --run --device cuda    # the cost of a check on a GPU, too
    python -m analysis.pfs --run --parts decisions --out DIR    # one of them again, the others stay in DIR

1. Cost of a check on tensors of FLUX.1-dev's real shapes (1024x1024), and its share of a step. 2. Steadiness
of the measure over steps, and how often a decision flips when the latents get a little noise, at thresholds
that let half of the checks hit. 3. Quality at thresholds re-tuned until every summary hits equally often;
a forced hit is no check's decision and does not count, and a threshold without hits is not determined.
The embedded model has so few tokens that its own window is 1: there full tensors are the default.

Writes pfs.png/.pdf/.csv and the answer in pfs.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean, median

import numpy as np

from analysis.ablations.pfs import BLOCKS, DRAWS, NOISES, OWN_HITS, PARTS, REFERENCE_GAP, run, typical_ratios
from analysis.ablations.summaries import COMPARED, FULL, PAPER
from analysis.cli import figure_script, shipped
from analysis.figures import style
from analysis.measuring import parser_of
from analysis.records.compare import Interval, as_table, bootstrap, number, paired
from analysis.records.provenance import source_of
from analysis.records.saved import MAYBE, NUMBER, Saved, read_saved

SHIPPED = Path(shipped("assets/results/tiny_flux_pfs"))
STAGES = ("structure", "detail")
SHAPES = {"▼": "v", "▲": "^", "◆": "D"}  # of the targets: in words and in the figure
NEEDS = {
    "cost": {"part": str, "device": str, "seconds": list},
    "steadiness": {"id": str, "stage": str, "summary": str, "clean": list, "noisy": dict},
    "decisions": {"id": str, "target": list, "summary": str, "tau1": NUMBER, "tau2": NUMBER, "hits": dict,
                  "blocks_run": int, "blocks": int, "psnr": MAYBE, "ssim": NUMBER},
}  # fmt: skip
MARKS = {"structure": "o", "detail": "s"}
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
        same = {"number of steps": lambda row: len(row["clean"])} if name == "steadiness" else {}
        found[name] = read_saved(paths[:1], needs, same=same, unique=("key",), check=CHECKS[name])
    return found


def _check_cost(row: dict) -> None:
    if row["part"] not in ("block", "check"):
        raise ValueError(f"'part' is {row['part']!r}, not block or check")
    if row["part"] == "check" and not {"stage", "summary", "bytes"} <= row.keys():
        raise ValueError("a check needs a stage, a summary and bytes")
    _numbers(row["seconds"], (len(row["seconds"]) or 1,), "seconds")


def _check_steadiness(row: dict) -> None:
    steps = len(row["clean"])
    _numbers(row["clean"], (max(steps, 2),), "clean")
    for level in map(str, NOISES):
        _numbers(row["noisy"].get(level), (steps, DRAWS), f"noisy at {level}")


def _check_decision(row: dict) -> None:
    _numbers(row["target"], (2,), "target")
    _numbers([row["hits"].get(stage) for stage in STAGES], (2,), "hits")


def _numbers(values: object, shape: tuple[int, ...], name: str) -> None:
    """ValueError unless `values` are finite numbers of this shape."""
    try:
        array = np.array(values, float)
    except (ValueError, TypeError):
        array = np.array(np.nan)
    if array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"{name!r} are not {' x '.join(map(str, shape))} numbers")


CHECKS = {"cost": _check_cost, "steadiness": _check_steadiness, "decisions": _check_decision}


def complete(saved: dict[str, Saved]) -> list[str]:
    """The summaries that all three files tell of, in both stages; the others go, with a complaint.

    Of the steadiness, prompts without a row for each stage and summary go: comparisons are paired by prompt.
    """
    cost, steady, decided = (saved[name] for name in NEEDS)
    if not any(r["part"] == "block" for r in cost.rows):
        raise ValueError("the cost of a block is missing: a check's share of a step cannot be told")
    told = [{(r.get("summary"), r.get("stage")) for r in rows} for rows in (cost.rows, steady.rows)]
    names = []
    for name in map(str, COMPARED):
        both = all((name, stage) in pairs for pairs in told for stage in STAGES)
        if both and any(r["summary"] == name for r in decided.rows):
            names.append(name)
        else:
            cost.complaints.append(f"{name!r}: not all three files have it for both stages")
    if str(FULL) not in names:
        cost.exit_code()
        raise ValueError("full tensors, with which all is compared, are missing")
    wanted = {(name, stage) for name in names for stage in STAGES}
    by_id: dict[str, set] = {}
    for row in steady.rows:
        by_id.setdefault(row["id"], set()).add((row["summary"], row["stage"]))
    lost = [i for i, found in by_id.items() if not wanted <= found]
    steady.complaints += [f"steadiness of {i}: not every stage and summary is there" for i in lost]
    steady.rows = [r for r in steady.rows if r["id"] not in lost and r["summary"] in names]
    if not steady.rows:
        steady.exit_code()
        raise ValueError("the steadiness of no prompt is complete")
    steady.rows.sort(key=lambda row: row["id"])  # the same order for every stage and summary
    known = {tuple(r["target"]) for r in decided.rows if r["summary"] == str(FULL)}
    lost = [target for target in targets_of(decided.rows) if target not in known]
    decided.complaints += [f"decisions like {a:g}/{b:g}: full tensors are missing" for a, b in lost]
    decided.rows = [r for r in decided.rows if r["summary"] in names and tuple(r["target"]) in known]
    return names


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


def targets_of(rows: list[dict]) -> list[tuple[float, float]]:
    """The thresholds on full tensors whose hits the others were tuned to."""
    return list(dict.fromkeys((r["target"][0], r["target"][1]) for r in rows))


def own_hits(rows: list[dict]) -> dict[str, float]:
    """Mean hits a request that each stage's own check gave: every structure hit forces one of detail."""
    structure, detail = (fmean(r["hits"][stage] for r in rows) for stage in STAGES)
    return {"structure": structure, "detail": detail - structure}


def undetermined(rows: list[dict], target: tuple[float, float]) -> list[str]:
    """Stages whose threshold nothing tells of: their own check hits less than OWN_HITS times a request."""
    full = [r for r in rows if (r["summary"], tuple(r["target"])) == (str(FULL), target)]
    return [stage for stage, hits in own_hits(full).items() if hits < OWN_HITS] if full else list(STAGES)


def _slope(rows: list[dict]) -> float:
    """dB for each time fewer blocks, of full tensors from the slowest target to the fastest; 0 with one."""
    points = []
    for target in targets_of(rows):
        mine = [r for r in rows if (r["summary"], tuple(r["target"])) == (str(FULL), target)]
        psnr = [r["psnr"] for r in mine if r["psnr"] is not None]
        if psnr:
            points.append((fewer(mine), fmean(psnr)))
    (x0, y0), (x1, y1) = (min(points), max(points)) if points else ((0, 0), (0, 0))
    return (y1 - y0) / (x1 - x0) if x1 != x0 else 0.0


def fewer(rows: list[dict]) -> float:
    """How many times fewer blocks were executed."""
    return sum(r["blocks"] for r in rows) / sum(r["blocks_run"] for r in rows)


# The figure.


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


# The answer.


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


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "pfs")
    parser.add_argument("--records", type=Path, default=SHIPPED, help="folder with the three record files")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="of the run")
    return parser.parse_args(argv)


@figure_script
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    folder = run(args) if args.run else args.records
    saved = read(folder)
    names = complete(saved)
    draw(saved, names, args.out / "pfs")
    style.write_words(args.out / "pfs.md", answer(saved, names, source_of(folder)))
    return max([found.exit_code() for found in saved.values()])  # a list: all of them tell


if __name__ == "__main__":
    sys.exit(main())
