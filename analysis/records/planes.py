"""Records of calibrations: the plane of tau1 and tau2 as a table, and its best pairs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from statistics import median

from analysis.cli import warn
from analysis.records import store
from analysis.records.compare import as_table, known, mean, times_fewer
from analysis.records.saved import MAYBE, NUMBER, check_fields
from h2cache import H2Config


def by_setting(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of each setting; those from before rows said theirs count as one, under ""."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        told = row.get("settings")
        found.setdefault(json.dumps(told, sort_keys=True) if told else "", []).append(row)
    return found


def table(rows: list[dict]) -> list[dict]:
    """One line for each pair, over prompts: means (of time: medians), against the uncached pictures.

    Raises ValueError for rows of several settings (`by_setting` divides them).
    """
    if len(by_setting(rows)) > 1:
        raise ValueError(f"rows of several settings do not make one table: {', '.join(by_setting(rows))}")
    base = {_drawn(r): r for r in rows if r["method"] == "none"}
    cached = [r for r in rows if r["method"] != "none"]
    settings = {json.dumps(r["config"]): r["config"] for r in cached}
    lines = []
    for config in sorted(settings.values(), key=lambda c: (float(c["tau1"]), float(c["tau2"]))):
        mine = [r for r in cached if r["config"] == config]
        uncached = [base[_drawn(r)] for r in mine]
        lines.append(
            {
                "config": config,
                "prompts": len(mine),
                "blocks": times_fewer(mine, uncached),
                "speed_up": median(r["seconds_uncached"] / r["seconds"] for r in mine),
                "seconds": median(r["seconds"] for r in mine),
                "seconds_uncached": median(r["seconds_uncached"] for r in mine),
                "psnr": mean(mine, "psnr"),
                "worst_psnr": min(known(mine, "psnr"), default=None),
                "ssim": mean(mine, "ssim"),
                "words": mean(mine, "words"),
                "words_uncached": mean(uncached, "words"),
                "clip_iqa": mean(mine, "clip_iqa"),
            }
        )
    return lines


def _drawn(row: dict) -> tuple:
    """What a row is of: two prompt files may use one id."""
    return row["id"], row.get("prompt"), row.get("seed")


def best(lines: list[dict], blocks: float) -> dict | None:
    """The pair of highest PSNR with at least `blocks` times fewer blocks."""
    return max(
        (p for p in lines if p["blocks"] >= blocks and p["psnr"]), key=lambda p: p["psnr"], default=None
    )


def show(line: dict) -> str:
    usual = asdict(H2Config())
    pair = ("tau1", "tau2")
    told = ", ".join(f"{k} {v}" for k, v in line["config"].items() if k in pair or v != usual[k])
    parts = [f"{told:<24} blocks {line['blocks']:5.2f}x  time {line['speed_up']:5.2f}x"]
    if line["psnr"] is None:
        parts.append("identical")
    else:
        parts.append(f"PSNR {line['psnr']:5.2f} dB (worst {line['worst_psnr']:.2f})  SSIM {line['ssim']:.4f}")
    if line["words"] is not None:
        parts.append(f"words {line['words']:.3f} (uncached {line['words_uncached']:.3f})")
    return "  ".join(parts)


def markdown(lines: list[dict]) -> str:
    """The saved measurements as the table of the README."""
    heads = ("tau1", "tau2", "hits in a row", "blocks", "time", "seconds", "PSNR dB", "SSIM")
    rows = []
    for line in lines:
        config = line["config"]
        cells = [config["tau1"], config["tau2"], config["max_consecutive_hits"] or "any"]
        cells += [f"{line['blocks']:.2f}x fewer", f"{line['speed_up']:.2f}x", f"{line['seconds']:.2f}"]
        cells += ["identical" if line["psnr"] is None else f"{line['psnr']:.1f}", f"{line['ssim']:.3f}"]
        rows.append(cells)
    return "\n".join(as_table(heads, rows))


def read(folder: Path) -> list[dict]:
    """All rows of a calibration, whichever processes wrote them, each once; packed files too."""
    rows: dict[str, dict] = {}
    for path in sorted([*folder.glob("records-*.jsonl"), *folder.glob("records-*.jsonl.gz")]):
        rows |= store.read_records(path)
    return [row for row in rows.values() if _usable(row, folder)]


NEEDS = {"id": str, "method": str, "config": dict, "seconds": NUMBER, "seconds_uncached": NUMBER}


NEEDS |= {"blocks_run": int, "psnr": MAYBE, "ssim": NUMBER, "words": MAYBE}


def _usable(row: dict, folder: Path) -> bool:
    """Whether a table can be made of `row`; says why not."""
    try:
        check_fields(row, NEEDS)
        if row["seconds"] <= 0 or row["blocks_run"] <= 0:
            raise ValueError("it took no time or ran no block")
    except ValueError as error:
        warn(f"{folder}: the record {row['key']} is left out: {error}")
        return False
    return True


def tables(folder: Path) -> str:
    """What `folder` holds as Markdown, a table for each setting."""
    found = by_setting(read(folder))
    if not found:
        raise FileNotFoundError(f"{folder} holds no records of a calibration (records-*.jsonl)")
    heads = [f"Settings: {setting or 'unknown'}\n\n" if len(found) > 1 else "" for setting in found]
    return "\n\n".join(head + markdown(table(rows)) for head, rows in zip(heads, found.values(), strict=True))
