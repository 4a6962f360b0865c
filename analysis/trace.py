"""The measure of every step and stage against its threshold, with hits, forced hits and misses.

    python -m analysis.trace                                         # from the shipped records
    python -m analysis.trace --records DIR/rows.jsonl --label "h2cache tau1=0.2 tau2=0.05"
    python -m analysis.trace --records outputs/records.jsonl --id sign03   # of run.py
    python -m analysis.trace --run --tau1 0.2 --tau2 0.05 --limit 8

One request (--id, else the first) and all requests together: the median measure with bands that hold half
and nine tenths of them, and the share of hits at every step. A forced hit has no measure: the structure stage
hit, so the detail stage did not look; nor has the first step, which has nothing to compare with.

Writes trace.png/.pdf/.csv, trace_all.png/.pdf/.csv and the counts in trace.md.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from analysis import keep, plots
from analysis.saved import Saved, guarded, read_saved
from analysis.trials import Trial, parser_of, source_of, write_about
from h2cache import H2Config

SHIPPED = Path("assets/results/tiny_flux_traces/rows.jsonl.gz")
NEEDS = {"id": str, "method": str, "trace": list}
LINE = {"branch": str, "stage": str, "outcomes": str, "measures": list}  # of a compact trace
OUTCOMES = {"H": ("hit", "#009E73", "x"), "F": ("forced hit", "#56B4E9", "|"), "M": ("miss", "#D55E00", "o")}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "trace")
    parser.add_argument(
        "--records", type=Path, default=SHIPPED, help="rows.jsonl or records.jsonl with traces"
    )
    parser.add_argument("--method", default="h2cache", help="default: %(default)s")
    parser.add_argument("--label", help="contestant of an experiment (default: the first of the method)")
    parser.add_argument("--id", help="request that is drawn alone (default: the first)")
    parser.add_argument("--tau1", type=float, default=0.2, help="of the run")
    parser.add_argument("--tau2", type=float, default=0.05, help="of the run")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> Path:
    """Draw every prompt once with H2-Cache; the pictures are not kept."""
    trial, rows = Trial.of(args), {}
    args.out.mkdir(parents=True, exist_ok=True)
    config = H2Config(tau1=args.tau1, tau2=args.tau2)
    for prompt in trial.prompts:
        trace = keep.compact(trial.draw(prompt, config).trace)
        rows[prompt.id] = {
            "key": prompt.id,
            "id": prompt.id,
            "method": "h2cache",
            "config": keep.settings_of(config),
        }
        rows[prompt.id]["trace"] = trace
    keep.write_records(args.out / "rows.jsonl", rows)
    write_about(args.out, "trace", args)
    return args.out / "rows.jsonl"


def read(path: Path, method: str, label: str | None) -> tuple[Saved, str]:
    """The rows of one contestant, each with a compact trace whose stages agree, and its name."""
    saved = read_saved([path], NEEDS, unique=("label", "key", "id"))
    rows = []
    for row in saved.rows:
        if row["method"] != method or (label is not None and row.get("label") != label):
            continue
        trace = (
            row["trace"] if not row["trace"] or "outcomes" in row["trace"][0] else _compacted(row["trace"])
        )
        wrong = trace is None or not all(_whole(line) for line in trace)
        if wrong or not trace:
            saved.complaints.append(f"{path}: the trace of {row['id']} ({method}) is empty or broken")
            continue
        rows.append(row | {"trace": trace})
    if not rows:
        saved.exit_code()
        raise ValueError(f"{path} holds no trace of {label or method}")
    named = rows[0].get("label")
    rows = [row for row in rows if row.get("label") == named]
    steps = Counter(len(row["trace"][0]["outcomes"]) for row in rows).most_common(1)[0][0]
    for row in rows:
        if len(row["trace"][0]["outcomes"]) != steps:
            saved.complaints.append(f"{path}: {row['id']} has another number of steps than {steps}")
    saved.rows = [row for row in rows if len(row["trace"][0]["outcomes"]) == steps]
    return saved, named or method


def _compacted(trace: list) -> list[dict] | None:
    """The compact form of the step records that run.py writes; None when they are broken."""
    try:
        return keep.compact(trace)
    except (TypeError, KeyError, AttributeError, IndexError):
        return None


def _whole(line: dict) -> bool:
    known = isinstance(line, dict) and all(isinstance(line.get(k), kind) for k, kind in LINE.items())
    return known and len(line["measures"]) == len(line["outcomes"]) and set(line["outcomes"]) <= set(OUTCOMES)


def stage_lines(row: dict) -> dict[str, dict]:
    """Stage to its line, of the first guidance branch."""
    first = row["trace"][0]["branch"]
    return {line["stage"]: line for line in row["trace"] if line["branch"] == first}


def thresholds_of(line: dict) -> np.ndarray:
    """One threshold a step; not a number where nothing was compared with any."""
    found = line.get("thresholds")
    if isinstance(found, list):
        return np.array(found, float)
    return np.full(len(line["outcomes"]), np.nan if found is None else found)


# The figures.


def draw_one(row: dict, path: Path) -> None:
    """One request: a panel for each stage."""
    lines, data = stage_lines(row), []
    with plots.figure(plots.PAGE, 2.7) as figure:
        panels = np.atleast_1d(figure.subplots(1, len(lines)))
        for n, (axes, (stage, line)) in enumerate(zip(panels, lines.items(), strict=True)):
            measures, outcomes = np.array(line["measures"], float), np.array(list(line["outcomes"]))
            steps, counts = np.arange(len(outcomes)), Counter(line["outcomes"])
            seen = np.isfinite(measures)
            axes.plot(steps[seen], measures[seen], color="#777777", linewidth=0.7, zorder=1)
            limit = thresholds_of(line)
            if np.isfinite(limit).any():
                axes.plot(steps, limit, "--", color="black", linewidth=0.9, label="threshold")
            for code, (name, colour, marker) in OUTCOMES.items():
                mine = outcomes == code
                style = {"color": colour, "markersize": 5 if marker == "|" else 3.5}
                axes.plot(steps[mine & seen], measures[mine & seen], marker, **style)
                foot = axes.get_xaxis_transform()  # without a measure: at the foot
                axes.plot(
                    steps[mine & ~seen], 0.04 + 0 * steps[mine & ~seen], marker, transform=foot, **style
                )
                if mine.any():
                    axes.plot([], [], marker, label=f"{name} ({counts[code]})", **style)
            data += [{"stage": stage, "step": int(s), "measure": float(m) if np.isfinite(m) else "",
                      "threshold": float(t) if np.isfinite(t) else "", "outcome": OUTCOMES[o][0]}
                     for s, m, t, o in zip(steps, measures, limit, outcomes, strict=True)]  # fmt: skip
            axes.set(xlabel="step", ylabel="relative change")
            if seen.any():
                plots.logarithmic(axes.yaxis)
                low, high = axes.get_ylim()
                axes.set_ylim(low * (low / high) ** 0.15, high)  # room at the foot
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
            plots.letter(axes, f"{'abcd'[n % 4]}  {stage}")
        plots.save(figure, path, data)


def draw_all(rows: list[dict], path: Path) -> None:
    """All requests: the measure with bands above, the shares of outcomes below."""
    names, data = list(stage_lines(rows[0])), []
    with plots.figure(plots.PAGE, 3.6) as figure:
        grid = figure.subplots(2, len(names), sharex=True, height_ratios=(2, 1), squeeze=False)
        for n, stage in enumerate(names):
            lines = [stage_lines(row)[stage] for row in rows if stage in stage_lines(row)]
            measures = np.array([line["measures"] for line in lines], float)
            outcomes = np.array([list(line["outcomes"]) for line in lines])
            steps = np.arange(measures.shape[1])
            seen = np.isfinite(measures).sum(0) >= min(3, len(lines))  # of fewer there is no band
            bands = np.zeros((5, 0))
            above, below = grid[:, n]
            if seen.any():
                bands = np.nanpercentile(measures[:, seen], (5, 25, 50, 75, 95), axis=0)
                colour = (plots.STRUCTURE, plots.DETAIL)[n % 2]
                above.fill_between(
                    steps[seen], bands[0], bands[4], color=colour, alpha=0.2, linewidth=0, label="nine tenths"
                )
                above.fill_between(
                    steps[seen], bands[1], bands[3], color=colour, alpha=0.4, linewidth=0, label="half"
                )
                above.plot(steps[seen], bands[2], color=colour, label="median of those compared")
                plots.logarithmic(above.yaxis)
            limit = thresholds_of(lines[0])
            if np.isfinite(limit).any():
                above.plot(steps, limit, "--", color="black", linewidth=0.9, label="threshold")
            above.set_ylabel("relative change")
            plots.letter(above, f"{'abcd'[n % 4]}  {stage}, {len(lines)} requests")
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
                         for s, v in zip(steps[seen], values, strict=True)]  # fmt: skip
        marks = [axes.get_legend_handles_labels() for axes in grid[:, 0]]
        handles, labels = (a + b for a, b in zip(*marks, strict=True))
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        plots.save(figure, path, data)


def answer(rows: list[dict], label: str, source: str) -> str:
    """Where in the run the hits are."""
    lines = [f"Source: {source}; {label}, {len(rows)} requests.", "",
             "| stage | steps | hits | forced | misses | hits in each third of the run |",
             "|---" * 6 + "|"]  # fmt: skip
    for stage in stage_lines(rows[0]):
        outcomes = np.array(
            [list(stage_lines(row)[stage]["outcomes"]) for row in rows if stage in stage_lines(row)]
        )
        steps = outcomes.shape[1]
        means = [(outcomes == code).sum(1).mean() for code in OUTCOMES]
        thirds = [(part != "M").mean() for part in np.array_split(outcomes, min(3, steps), axis=1)]
        cells = [stage, str(steps), *(f"{m:.1f}" for m in means), ", ".join(f"{t:.0%}" for t in thirds)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@guarded
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    path = run(args) if args.run else args.records
    saved, label = read(path, args.method, args.label)
    one = next((row for row in saved.rows if args.id in (None, row["id"])), None)
    if one is None:
        raise ValueError(f"{path} holds no request {args.id!r} of {label}")
    draw_one(one, args.out / "trace")
    draw_all(saved.rows, args.out / "trace_all")
    plots.write_words(args.out / "trace.md", answer(saved.rows, label, source_of(path.parent)))
    return saved.exit_code()


if __name__ == "__main__":
    sys.exit(main())
