"""Records of what pooled feature summaries cost and decide: what can be used, and numbers from them."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, median

import numpy as np

from analysis.ablations.pfs import BLOCKS, DRAWS, NOISES, OWN_HITS
from analysis.ablations.summaries import COMPARED, FULL
from analysis.records.compare import Interval, bootstrap
from analysis.records.saved import MAYBE, NUMBER, Saved, find_records, read_saved

STAGES = ("structure", "detail")
NEEDS = {
    "cost": {"part": str, "device": str, "seconds": list},
    "steadiness": {"id": str, "stage": str, "summary": str, "clean": list, "noisy": dict},
    "decisions": {"id": str, "target": list, "summary": str, "tau1": NUMBER, "tau2": NUMBER, "hits": dict,
                  "blocks_run": int, "blocks": int, "psnr": MAYBE, "ssim": NUMBER},
}  # fmt: skip


def read(folder: Path) -> dict[str, Saved]:
    """The rows of cost, steadiness and decisions."""
    found = {}
    for name, needs in NEEDS.items():
        path = find_records(folder, name)
        same = {"number of steps": lambda row: len(row["clean"])} if name == "steadiness" else {}
        found[name] = read_saved([path], needs, same=same, unique=("key",), check=CHECKS[name])
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
    """The summaries that are in all three files, in both stages; the others go, with a complaint.

    Of the steadiness, prompts without a row for each stage and summary go: comparisons are paired by prompt.
    """
    cost, steady, decided = (saved[name] for name in NEEDS)
    if not any(r["part"] == "block" for r in cost.rows):
        raise ValueError("the cost of a block is missing: a check's share of a step is unknown")
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
