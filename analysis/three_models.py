"""Every method on three small models, and which claim holds on which.

    python -m analysis.three_models                              # from the shipped records
    python -m analysis.experiment --model assets/tiny_wan ... --out RUN      # the command is in about.json
    python -m analysis.three_models --collect RUN --model tiny_wan

    python -m analysis.three_models --collect RUN --model tiny_wan --tuned   # none and plan, tuned afterwards

`--collect` checks the pictures of an experiment by the model's own measure and keeps its rows. Of videos PSNR
is the mean over frames, and flicker the mean error of the change from frame to frame, in levels of 8 bits.

A method's value at a ratio of blocks is that of the setting within 3 % of it; else it lies, picture by
picture, on the line between its two nearest settings. Intervals are 95 % bootstrap over pictures; of a
comparison, of paired differences.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from PIL import Image

from analysis.cli import guarded
from analysis.figures import style
from analysis.measures.strips import flicker, frames_of, psnr
from analysis.options import Parser
from analysis.pareto import SHIPPED
from analysis.records import store
from analysis.records.compare import (
    Interval,
    as_table,
    bootstrap,
    groups,
    lines_of,
    mean,
    number,
    times_fewer,
)
from analysis.records.saved import MAYBE, NUMBER, Saved, read_saved
from analysis.tiny_dit.classifier import Judge
from analysis.tiny_dit.digits import NAMES
from analysis.tiny_wan import clips, evaluate

FOLDER = Path("assets/results/three_models")
RECORDS = {"tiny_flux": SHIPPED} | {m: FOLDER / f"{m}.jsonl.gz" for m in ("tiny_wan", "tiny_dit")}
EXPERIMENT = Path("assets/results/experiment/rows.jsonl")
RIGHT = {"tiny_flux": "words read", "tiny_wan": "everything right", "tiny_dit": "class right"}
KEPT = (
    "key", "id", "label", "method", "seed", "seconds", "blocks_run", "blocks", "steps_recorded", "bytes_held",
)  # fmt: skip
RATIOS, NEAR = (5.0, 3.0), 0.03
GRID, TUNED, FEWER = "plan file=none", "plan", "fewer_steps"
REUSE = ("block_cache", "teacache", "magcache", "h2cache")
FORECAST = "h2cache predictor=taylor"
YES, NO, OPEN, NONE = "yes", "no", "not shown", "not measured"
NEEDS = {"id": str, "label": str, "method": str, "seconds": NUMBER, "blocks_run": int, "psnr": MAYBE}
Values = dict[str, float]  # by picture
Rows = list[dict[str, Any]]


# Collecting.


def checker(model: str) -> Callable[[dict, np.ndarray], bool]:
    """Whether the picture of a row shows what was asked for."""
    if model == "tiny_wan":
        specs = {clips.prompt(spec): spec for spec in evaluate.held_out(64)}
        return lambda row, frames: bool(evaluate.check(frames, specs[row["prompt"]])["all_ok"])
    judge, names = Judge.of("assets/tiny_dit/judge"), list(NAMES)
    return lambda row, frames: judge.classes([Image.fromarray(frames[0])])[0] == names.index(row["prompt"])


def tuned_rows(model: str) -> Path:
    """The tuned plan of a model, drawn later, with uncached pictures of its own."""
    return FOLDER / f"{model}_tuned.jsonl.gz"


def collect(run: Path, model: str, tuned: bool = False) -> None:
    """Check the pictures of the experiment in `run`, and keep its rows among the shipped records."""
    rows = [row for path in sorted(run.glob("runs/*/rows/*.json")) if (row := store.read_json(path))]
    labels = {row["label"] for row in rows}
    drawn = Counter(row["id"] for row in rows)
    rows = [row for row in rows if drawn[row["id"]] == len(labels)]  # of a stopped run, whole prompts
    rows.sort(key=lambda row: (row["label"], row["id"]))
    images = {path.stem: path for path in run.glob("runs/*/images/*.png")}
    right = checker(model)
    base = {row["id"]: frames_of(images[row["key"]]) for row in rows if row["method"] == "none"}
    found = []
    for row in rows:
        frames = frames_of(images[row["key"]])
        score = {"psnr": psnr(frames, base[row["id"]]), "flicker": flicker(frames, base[row["id"]])}
        score = {k: v and round(v, 4) for k, v in score.items()} | {"right": float(right(row, frames))}
        found.append({k: row[k] for k in KEPT} | score)
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in found)
    path = tuned_rows(model) if tuned else RECORDS[model]
    store.write_atomically(path, gzip.compress(text.encode(), mtime=0))
    table = store.read_json(run / "table.json") or {}
    about = (store.read_json(FOLDER / "about.json") or {}) | {
        path.name.split(".")[0]: {
            "command": table.get("command"),
            "machine": rows[0]["machine"],
            "date": rows[0]["date"],
        }
    }
    store.write_atomically(FOLDER / "about.json", (json.dumps(about, indent=1) + "\n").encode())


def of_file(path: Path) -> Saved:
    """Its rows, each with how many times faster than the uncached picture of the same run it was."""
    saved = read_saved([path], NEEDS)
    base = saved.keep_with_uncached(path)
    saved.rows = [row | {"faster": base[row["id"]]["seconds"] / row["seconds"]} for row in saved.rows]
    return saved


def read(model: str) -> Saved:
    """The rows of a model, each with `right` and the `line` of its method."""
    saved = of_file(RECORDS[model])
    if model == "tiny_flux":  # the plan at 5x has more pictures, and words, in the paper's experiment
        more = of_file(EXPERIMENT)
        saved.complaints += more.complaints
        saved.rows = [r for r in saved.rows if r["method"] != "plan" or not r["label"].endswith("=5")]
        plans = [r for r in more.rows if r["method"] == "plan"]
        saved.rows += [r | {"label": f"{r['label']} speedup=5"} for r in plans]
    elif tuned_rows(model).is_file():
        more = of_file(tuned_rows(model))
        saved.complaints += more.complaints
        saved.rows += [row for row in more.rows if row["method"] == "plan"]
    lines = lines_of(list(groups(saved.rows, "label")))
    for row in saved.rows:
        row |= {"line": lines[row["label"]], "right": row.get("right", row.get("words_read"))}
    return saved


# Values.


def values(rows: Rows, line: str, ratio: float, what: str = "psnr") -> Values:
    """`what` of a line at `ratio` times fewer blocks, for each picture; empty: it was not measured there."""
    base = {row["id"]: row for row in rows if row["method"] == "none"}
    own = [row for row in rows if row["line"] == line and row["method"] != "none"]
    points = []
    for mine in groups(own, "label").values():
        known = {r["id"]: r[what] for r in mine if r[what] is not None}
        points.append((times_fewer(mine, [base[r["id"]] for r in mine]), known))
    points.sort(key=lambda point: point[0])
    near = [p for p in points if abs(p[0] / ratio - 1) <= NEAR]
    if near:
        return min(near, key=lambda p: abs(p[0] - ratio))[1]
    below, above = [p for p in points if p[0] < ratio], [p for p in points if p[0] > ratio]
    if not below or not above:
        return {}
    (a, first), (b, second) = below[-1], above[0]
    share = (ratio - a) / (b - a)
    return {i: first[i] * (1 - share) + second[i] * share for i in sorted(first.keys() & second.keys())}


def gain(rows: Rows, a: str, b: str, ratio: float = 5.0, what: str = "psnr") -> Interval | None:
    """How much larger `what` is by line `a` than by line `b`; None: not measured."""
    first, second = values(rows, a, ratio, what), values(rows, b, ratio, what)
    shared = sorted(first.keys() & second.keys())
    return bootstrap([first[i] - second[i] for i in shared]) if shared else None


# Claims: each gives a verdict, and what it rests on.

Verdict = tuple[str, str]


def above(found: Interval | None, limit: float = 0.0) -> Verdict:
    if found is None:
        return NONE, ""
    verdict = YES if found.low > limit else NO if found.high < limit else OPEN
    return verdict, f"{found:+.1f} dB"


def ahead_of_all(rows: Rows) -> Verdict:
    """The default grid, which is chosen without measuring, against every line that is not the plan's."""
    others = sorted({r["line"] for r in rows if r["method"] not in ("none", "plan")})
    gains = {line: found for line in others if (found := gain(rows, GRID, line))}
    if not gains:
        return NONE, ""
    nearest = min(gains, key=lambda line: gains[line].mean)
    verdicts = {above(found)[0] for found in gains.values()}
    verdict = NO if NO in verdicts else OPEN if OPEN in verdicts else YES
    return verdict, f"next is {name(nearest)}: {above(gains[nearest])[1]}"


def grid_is_near(rows: Rows) -> Verdict:
    verdict, text = above(gain(rows, TUNED, GRID), 3.0)
    return {YES: NO, NO: YES}.get(verdict, verdict), text and f"tuned {text}"


def reuse_beats_fewer(rows: Rows) -> Verdict:
    gains = {line: found for line in REUSE if (found := gain(rows, line, FEWER))}
    if not gains:
        return NONE, ""
    best = max(gains, key=lambda line: gains[line].mean)
    verdict, text = above(gains[best])
    return verdict, f"best is {name(best)}: {text}"


def right_as_uncached(rows: Rows) -> Verdict:
    """No: fewer right; yes: at most 5 in 100 fewer, as far as the interval goes."""
    base = {r["id"]: r["right"] for r in rows if r["method"] == "none"}
    mine = values(rows, GRID, 5.0, "right")
    pairs = [mine[i] - base[i] for i in mine if base[i] is not None]
    if not pairs:
        return NONE, ""
    found = bootstrap(pairs)
    verdict = NO if found.high < 0 else YES if found.low >= -0.05 else OPEN
    return verdict, f"{found:+.1%}"


CLAIMS: dict[str, Callable[[Rows], Verdict]] = {
    "the plan (default grid) is closest to the uncached picture, of all methods": ahead_of_all,
    "the plan is closer than fewer steps": lambda rows: above(gain(rows, GRID, FEWER)),
    "its default grid is within 3 dB of the tuned one": grid_is_near,
    "its pictures are right as often as uncached ones": right_as_uncached,
    "payback is better than none (Taylor in the paper's rule)": lambda rows: above(
        gain(rows, f"{FORECAST} repay=true", FORECAST)
    ),
    "a forecast in the paper's rule is better than reuse": lambda rows: above(
        gain(rows, FORECAST, "h2cache")
    ),
    "two thresholds are better than one (Block Cache)": lambda rows: above(
        gain(rows, "h2cache", "block_cache")
    ),
    "Hermite is better than Taylor (HiCache, TaylorSeer)": lambda rows: above(
        gain(rows, "hicache", "taylorseer")
    ),
    "reuse is closer than fewer steps": reuse_beats_fewer,
}


def name(line: str) -> str:
    return style.look(line).name


# Words.


def claims_table(models: dict[str, Rows]) -> list[str]:
    def cell(verdict: str, text: str) -> str:
        return f"**{verdict}**" + (f" ({text})" if text else "")

    found = [[claim, *(cell(*ask(rows)) for rows in models.values())] for claim, ask in CLAIMS.items()]
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
        cells = [[s, f"{r['words']:.1%}", f"{r['texture']:.1%}"] for s, r in flux["by_steps"].items()]
        lines += ["", f"tiny_flux, {flux['summary']['images']} signs:", ""]
        lines += as_table(("steps", "words read", "texture"), cells)
    wan = store.read_json(Path("assets/tiny_wan/evaluation.json")) or {"summaries": {}}
    cells = [[s, f"{r['all']:.1%}", f"{r['flicker_levels']:.2f}"] for s, r in wan["summaries"].items()]
    lines += ["", "tiny_wan, 64 clips:", ""]
    lines += as_table(("steps", "everything right", "flicker, levels"), cells)
    dit = store.read_json(Path("assets/tiny_dit/evaluation.json")) or {"by_steps": {}}
    cells = [[s, f"{r['right']:.1%}", f"{r['frechet']:.2f}"] for s, r in dit["by_steps"].items()]
    return [*lines, "", "tiny_dit, 200 digits:", "", *as_table(("steps", "class right", "Fréchet"), cells)]


def write(out: Path) -> int:
    """three_models.md in `out`; 1 where a record was left out, else 0."""
    saved = {model: read(model) for model in RECORDS}
    models = {model: found.rows for model, found in saved.items()}
    lines = ["# Three models", "", *claims_table(models)]
    for model, rows in models.items():
        pictures = {m: len({r["id"] for r in rows if r["method"] == m}) for m in ("none", "plan")}
        lines += ["", f"## {model}: {pictures['none']} pictures, {pictures['plan']} by the plan", ""]
        lines += methods_table(model, rows)
    lines += ["", "## Few steps, uncached", *steps_tables(), ""]
    out.mkdir(parents=True, exist_ok=True)
    store.write_atomically(out / "three_models.md", "\n".join(lines).encode())
    return max([found.exit_code() for found in saved.values()])  # a list: all of them tell


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--collect", type=Path, help="folder (--out) of an experiment")
    parser.add_argument("--model", choices=[m for m in RECORDS if m != "tiny_flux"], help="of --collect")
    parser.add_argument("--tuned", action="store_true", help="--collect the tuned plan, beside the others")
    parser.add_argument("--out", type=Path, default=Path("outputs/three_models"))
    args = parser.parse_args(argv)
    if bool(args.collect) != bool(args.model):
        parser.error("--collect and --model go together")
    if args.collect:
        return guarded(lambda: collect(args.collect, args.model, args.tuned), "nothing")
    return guarded(lambda: write(args.out), "nothing")


if __name__ == "__main__":
    sys.exit(main())
