"""The records of every method on the three embedded models: collected from experiments, and read."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from analysis import separation
from analysis.measures.strips import flicker, frames_of, psnr
from analysis.pareto import SHIPPED
from analysis.records import store
from analysis.records.compare import groups, lines_of
from analysis.records.saved import MAYBE, NUMBER, Saved, read_saved
from analysis.tiny_dit.classifier import Judge
from analysis.tiny_dit.digits import NAMES
from analysis.tiny_wan import clips, evaluate

FOLDER = Path("assets/results/three_models")
RECORDS = {"tiny_flux": SHIPPED} | {m: FOLDER / f"{m}.jsonl.gz" for m in ("tiny_wan", "tiny_dit")}
EXPERIMENT = Path("assets/results/experiment/rows.jsonl")
KEPT = (
    "key", "id", "label", "method", "seed", "sampler", "steps", "seconds", "blocks_run", "blocks",
    "steps_recorded", "bytes_held",
)  # fmt: skip
NEEDS = {"id": str, "label": str, "method": str, "seconds": NUMBER, "blocks_run": int, "psnr": MAYBE}
FURTHER = ("tuned", "claims", "modules", "samplers")  # drawn later: the plan; what a claim needs; ...
Rows = list[dict[str, Any]]


def checker(model: str) -> Callable[[dict, Path, np.ndarray], float | None]:
    """Whether a row's picture (file, frames) shows what was asked for; None: no words were read."""
    if model == "tiny_flux":
        return lambda row, path, frames: words_of(path)
    if model == "tiny_wan":
        specs = {clips.prompt(spec): spec for spec in evaluate.held_out(64)}
        return lambda row, path, frames: float(evaluate.check(frames, specs[row["prompt"]])["all_ok"])
    judge, names = Judge.of("assets/tiny_dit/judge"), list(NAMES)

    def is_class(row: dict, path: Path, frames: np.ndarray) -> float:
        return float(judge.classes([Image.fromarray(frames[0])])[0] == names.index(row["prompt"]))

    return is_class


def words_of(image: Path) -> float | None:
    """The share of the words that an experiment read in its own picture."""
    scores = store.read_json(image.parents[1] / "scores" / f"{image.stem}.json") or {}
    return scores.get("words_read")


def further_rows(model: str) -> dict[str, Path]:
    """Files of what was drawn later, each with uncached pictures of its own."""
    return {what: FOLDER / f"{model}_{what}.jsonl.gz" for what in FURTHER}


def collect(runs: list[Path], model: str, what: str | None = None) -> None:
    """Check the pictures of experiments, and keep their rows among the shipped records.

    what: a file of their own, see `further_rows`.
    """
    found, commands = [], []
    for run in runs:
        rows = [row for path in sorted(run.glob("runs/*/rows/*.json")) if (row := store.read_json(path))]
        if not any(row["method"] == "none" for row in rows):
            raise ValueError(f"{run}: no uncached picture to compare with: give the --out of an experiment")
        labels = {row["label"] for row in rows}
        drawn = Counter(row["id"] for row in rows)
        rows = [row for row in rows if drawn[row["id"]] == len(labels)]  # of a stopped run, whole prompts
        if not rows:
            raise ValueError(f"{run}: no prompt was drawn by all methods: let the experiment go on first")
        rows.sort(key=lambda row: (row["label"], row["id"]))
        found += list(checked(rows, {path.stem: path for path in run.glob("runs/*/images/*.png")}, model))
        table = store.read_json(run / "table.json") or {}
        commands.append(table.get("command"))
        about = {"machine": rows[0]["machine"], "date": rows[0]["date"]}
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in found)
    path = further_rows(model)[what] if what else RECORDS[model]
    store.write_atomically(path, gzip.compress(text.encode(), mtime=0))
    all_of = (store.read_json(FOLDER / "about.json") or {}) | {
        path.name.split(".")[0]: {"command": commands[0] if len(commands) == 1 else commands} | about
    }
    store.write_atomically(FOLDER / "about.json", (json.dumps(all_of, indent=1) + "\n").encode())


def checked(rows: Rows, images: dict[str, Path], model: str) -> Iterator[dict]:
    """What is kept of the rows of one run, with how like the uncached ones their pictures are."""
    right = checker(model)
    base = {row["id"]: frames_of(images[row["key"]]) for row in rows if row["method"] == "none"}
    for row in rows:
        frames = frames_of(images[row["key"]])
        score = {"psnr": psnr(frames, base[row["id"]]), "flicker": flicker(frames, base[row["id"]])}
        score = {k: v and round(v, 4) for k, v in score.items()}
        shown = right(row, images[row["key"]], frames)
        kept = {k: row[k] for k in KEPT if k in row}
        yield kept | score | {"right": shown}


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
    for what, path in further_rows(model).items():
        if what != "samplers" and path.is_file():
            more = of_file(path)
            saved.complaints += more.complaints
            new = [row for row in more.rows if row["method"] != "none"]
            if what == "tuned":  # the plan: drawn again whenever it changes
                drawn = {row["label"] for row in new}
                saved.rows = [row for row in saved.rows if row["label"] not in drawn] + new
            else:
                drawn = {row["label"] for row in saved.rows}
                saved.rows += [row for row in new if row["label"] not in drawn]
    lines = lines_of(list(groups(saved.rows, "label")))
    for row in saved.rows:
        row |= {"line": lines[row["label"]], "right": row.get("right", row.get("words_read"))}
    return saved


def frozen_rows(model: str) -> Rows:
    """What `analysis.separation` found on a model, with one stage frozen; empty: it was not run there."""
    folder = Path(f"assets/results/{model}_separation")
    rows = separation.read(folder).rows if folder.is_dir() else []
    return [row for row in rows if row["stage"] in ("structure", "detail")]


def sampler_rows() -> Rows:
    """tiny_flux under other samplers and numbers of steps, each row with the `line` of its method."""
    path = further_rows("tiny_flux")["samplers"]
    rows = read_saved([path], NEEDS | {"sampler": str, "steps": int}).rows if path.is_file() else []
    lines = lines_of(list(groups(rows, "label")))
    return [row | {"line": lines[row["label"]]} for row in rows]
