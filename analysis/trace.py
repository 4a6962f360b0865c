"""The measure of every step and stage against its threshold, with hits, forced hits and misses.

    python -m analysis.trace                                         # from the shipped records
    python -m analysis.trace --records DIR/rows.jsonl --label "h2cache tau1=0.2 tau2=0.05"
    python -m analysis.trace --records outputs/records.jsonl --id sign03   # of run.py
    python -m analysis.trace --run --tau1 0.2 --tau2 0.05 --limit 8
    python -m analysis.trace --run --method plan --set speedup=5 --limit 8     # its steps, and its own errors

One request (--id, else the first) and all requests together: the median measure with bands that hold half
and nine tenths of them, and the share of hits at every step. A forced hit has no measure: the structure stage
hit, so the detail stage did not look; nor has the first step, which has nothing to compare with. Both are
drawn in a strip below the measures. Requests of other settings than the first are left out: --label chooses.

Writes trace.png/.pdf/.csv, trace_all.png/.pdf/.csv and the counts in trace.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from analysis.cli import figure_script, shipped
from analysis.drawing.draw import Drawn
from analysis.drawing.prompts import Prompt
from analysis.figures import style
from analysis.measuring import Trial, measure, parser_of, recorded
from analysis.options import number
from analysis.records import store
from analysis.records.compare import as_table
from analysis.records.provenance import source_of
from analysis.records.saved import Saved, read_saved
from analysis.settings import parse_settings
from h2cache import H2Config, find_method, method_names

SHIPPED = Path(shipped("assets/results/tiny_flux_traces/rows.jsonl.gz"))
NEEDS = {"id": str, "method": str, "trace": list}
LINE = {"branch": str, "stage": str, "outcomes": str, "measures": list}  # of a compact trace
OUTCOMES = {"H": ("hit", "#009E73", "x"), "F": ("forced hit", "#56B4E9", "|"), "M": ("miss", "#D55E00", "o")}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "trace")
    parser.add_argument(
        "--records", type=Path, default=SHIPPED, help="rows.jsonl or records.jsonl with traces"
    )
    parser.add_argument("--method", default="h2cache", help="default: %(default)s")
    parser.add_argument(
        "--label", help='contestant, or settings as "tau1=0.1 tau2=0.05" (default: the first of the method)'
    )
    parser.add_argument("--id", help="request that is drawn alone (default: the first)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the run")
    parser.add_argument("--tau1", type=number, default=0.2, help="of the run")
    parser.add_argument("--tau2", type=number, default=0.05, help="of the run")
    return parser.parse_args(argv)


@recorded("trace")
def run(args: argparse.Namespace) -> Path:
    """Draw every prompt once with the method; the pictures are not kept. A stopped run goes on."""
    kind = find_method(args.method)
    taus = {"tau1": args.tau1, "tau2": args.tau2} if kind is H2Config else {}
    config = kind(**taus | parse_settings(kind, args.set))
    trial, path = Trial.of(args), args.out / "rows.jsonl"
    known = {"method": config.name, "config": store.settings_of(config)}

    def rows(_: Prompt, drawn: dict[str, Drawn]) -> dict[str, dict]:
        return {name: known | {"trace": store.compact(found.trace)} for name, found in drawn.items()}

    measure(path, trial.prompts, {repr(config): config}, trial.draw, rows, trial.key)
    return path


def read(path: Path, method: str, label: str | None) -> tuple[Saved, str]:
    """The rows of one contestant, each with a compact trace whose stages agree, and its name.

    label: of the contestant, or its settings as `settings_told` writes them; None: those of the first row.
    """
    saved = read_saved([path], NEEDS, unique=("label", "key", "id"))
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in saved.rows:
        if row["method"] != method:
            continue
        trace = (
            row["trace"] if not row["trace"] or "outcomes" in row["trace"][0] else _compacted(row["trace"])
        )
        if not trace or not all(_whole(line) for line in trace):
            saved.complaints.append(f"{path}: the trace of {row['id']} ({method}) is empty or broken")
            continue
        groups.setdefault((row.get("label") or method, settings_told(row)), []).append(row | {"trace": trace})
    chosen = [group for group in groups if label is None or label in group]
    if not chosen:
        saved.exit_code()
        raise ValueError(f"{path} holds no trace of {label or method}")
    named, told = chosen[0]
    for other, settings in chosen[1:]:
        if label is not None or other == named:  # contestants of an experiment have labels of their own
            saved.complaints.append(
                f"{path}: {len(groups[other, settings])} requests of {other} with {settings}: drawn are "
                f'those with {told}; --label "{settings}" chooses the others'
            )
    rows = groups[chosen[0]]
    shape = Counter(map(_shape, rows)).most_common(1)[0][0]
    for row in rows:
        if _shape(row) != shape:
            saved.complaints.append(
                f"{path}: {row['id']} has other stages or steps ({_shape_told(_shape(row))}) than most "
                f"({_shape_told(shape)})"
            )
    saved.rows = [row for row in rows if _shape(row) == shape]
    return saved, f"{named} {told}" if named == method and "=" in told else named


def settings_told(row: dict) -> str:
    """The thresholds of a request and what else is not the default, as "tau1=0.2 tau2=0.05"."""
    config = row.get("config")
    if not isinstance(config, dict):
        return "no settings"
    known = row["method"] in method_names()
    usual = {} if not known else json.loads(json.dumps(store.settings_of(find_method(row["method"])())))
    told = {k: v for k, v in config.items() if k in ("tau1", "tau2") or v != usual.get(k)}
    return " ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in told.items())


def _shape(row: dict) -> tuple[tuple[str, int], ...]:
    """Stages and their steps, of the first guidance branch."""
    return tuple((stage, len(line["outcomes"])) for stage, line in stage_lines(row).items())


def _shape_told(shape: tuple[tuple[str, int], ...]) -> str:
    return ", ".join(f"{stage} {steps} steps" for stage, steps in shape)


def _compacted(trace: list) -> list[dict] | None:
    """The compact form of the step records that run.py writes; None when they are broken."""
    try:
        return store.compact(trace)
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


@figure_script
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    path = run(args) if args.run else args.records
    saved, label = read(path, args.method, args.label)
    one = next((row for row in saved.rows if args.id in (None, row["id"])), None)
    if one is None:
        raise ValueError(f"{path} holds no request {args.id!r} of {label}")
    draw_one(one, args.out / "trace")
    draw_all(saved.rows, args.out / "trace_all")
    style.write_words(args.out / "trace.md", answer(saved.rows, label, source_of(path.parent)))
    return saved.exit_code()


if __name__ == "__main__":
    sys.exit(main())
