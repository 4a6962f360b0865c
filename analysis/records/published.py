"""What the papers and repositories printed."""

from __future__ import annotations

from pathlib import Path

from analysis.cli import shipped
from analysis.records.compare import as_table
from analysis.records.saved import read_saved

PUBLISHED = Path(shipped("assets/published_results.jsonl"))


def published(path: Path = PUBLISHED) -> list[dict]:
    """What the papers and repositories printed."""
    return read_saved([path], {"method": str, "source": str}).rows


def published_markdown(rows: list[dict]) -> str:
    heads = ("model", "data", "method", "setting", "steps", "seconds", "speed_up", "clip_iqa", "hardware")
    heads = (*heads, "source")
    about = "1024x1024, except where no steps stand: there the source states no size either"
    parts = as_table(heads, [[row[head] for head in heads] for row in rows])
    return "\n".join([f"**Published by others, not measured here** ({about}):", "", *parts, ""])
