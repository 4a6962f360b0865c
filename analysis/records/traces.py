"""Traces of requests: their rows, whatever wrote them, and what each step decided."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np

from analysis.records import store
from analysis.records.saved import Saved, read_saved
from h2cache import find_method, method_names

NEEDS = {"id": str, "method": str, "trace": list}
LINE = {"branch": str, "stage": str, "outcomes": str, "measures": list}  # of a compact trace
OUTCOMES = {"H": ("hit", "#009E73", "x"), "F": ("forced hit", "#56B4E9", "|"), "M": ("miss", "#D55E00", "o")}


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
