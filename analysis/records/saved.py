"""Saved records for figures: what can be read is used, what cannot is named.

A line is left out, with its file and number, when it is no JSON object, holds NaN, lacks a field that the
figure needs, stands there already, or belongs to other settings than most (two runs mixed in one file).
Files ending in .gz are unpacked; one that breaks off is used as far as it goes.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NUMBER = (int, float)
MAYBE = (int, float, type(None))  # a number, or null where it could not be measured


@dataclass
class Saved:
    """Rows that can be used, and one sentence for each line that cannot."""

    rows: list[dict] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def keep_with_uncached(self, source: Path) -> dict[str, dict]:
        """Leave out prompts whose uncached picture is missing; returns the uncached rows by prompt."""
        base = {row["id"]: row for row in self.rows if row["method"] == "none"}
        lost = sorted({row["id"] for row in self.rows} - base.keys())
        self.complaints += [f"{source}: all pictures of {i}, whose uncached one is missing" for i in lost]
        self.rows = [row for row in self.rows if row["id"] in base]
        return base

    def exit_code(self) -> int:
        """0, or 1 after naming the broken lines on the standard error output."""
        for complaint in self.complaints:
            print(f"left out: {complaint}", file=sys.stderr)
        return 1 if self.complaints else 0


def read_saved(
    paths: Sequence[Path],
    needs: Mapping[str, Any],
    same: Mapping[str, Callable[[dict], Any]] | None = None,
    unique: Sequence[str] = (),
    check: Callable[[dict], None] = lambda row: None,
) -> Saved:
    """The rows of some `.jsonl` or `.jsonl.gz` files.

    needs: field and type (or types) of what every row must have. same: what is equal in all rows of one
    run, as a name and how to get it from a row. unique: fields that together name a row. check: raises
    ValueError for a row that is wrong in another way. Raises OSError for a file that cannot be opened and
    ValueError when no row is left.
    """
    saved, places, seen = Saved(), [], {}
    for path in paths:
        for number, _, row in scan(path, needs):
            try:
                if isinstance(row, ValueError):
                    raise row
                check(row)
                identity = tuple(str(row.get(name)) for name in unique)
                if unique and identity in seen:
                    raise ValueError(f"the same picture stands already in {seen[identity]}")
            except ValueError as error:
                saved.complaints.append(f"{path} line {number}: {error}")
                continue
            seen[identity] = f"{path} line {number}"
            saved.rows.append(row)
            places.append((path, number))
    _keep_one_run(saved, places, same or {})
    if not saved.rows:
        saved.exit_code()
        raise ValueError(f"no usable row in {', '.join(map(str, paths)) or 'no file'}")
    return saved


def find_records(folder: Path, name: str) -> Path:
    """NAME.jsonl in `folder`, or NAME.jsonl.gz; FileNotFoundError where neither is there."""
    for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} holds no {name}.jsonl or {name}.jsonl.gz")


class BreaksOff(ValueError):
    """A file ends in the middle of a line."""


def scan(path: Path, needs: Mapping[str, Any]) -> Iterator[tuple[int, bytes, dict | ValueError]]:
    """Every line that is not empty: its number, itself, and its row, or what is wrong with it.

    Files ending in .gz are unpacked. What a killed process or a cut copy left at the end BreaksOff.
    """
    data, whole = path.read_bytes(), True
    if path.suffix == ".gz":
        reader = zlib.decompressobj(wbits=31)
        try:
            data = reader.decompress(data)
        except zlib.error:
            data = b""
        whole = reader.eof
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, line, row_of(line, needs)
            except ValueError as error:
                torn = number == len(lines) and path.suffix != ".gz"
                yield number, line, BreaksOff(str(error)) if torn else error
    if not whole:
        yield len(lines), b"", BreaksOff("the compressed file breaks off here")


def row_of(line: bytes, needs: Mapping[str, Any]) -> dict:
    """One row; ValueError says what is wrong with it."""
    try:
        row = json.loads(line.decode("utf-8-sig"), parse_constant=_no_constant, parse_float=_finite)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("broken JSON (nested too deeply)") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
    check_fields(row, needs)
    return row


def check_fields(row: dict, needs: Mapping[str, Any]) -> None:
    """ValueError unless `row` has the fields of `needs`, each of its type."""
    for name, kind in needs.items():
        if name not in row:
            raise ValueError(f"it has no {name!r}: not a record of this kind")
        wrong = not isinstance(row[name], kind) or (isinstance(row[name], bool) and kind in (NUMBER, MAYBE))
        if wrong:
            raise ValueError(f"{name!r} is {row[name]!r:.40}, not of the right type")


def _no_constant(text: str) -> None:
    raise ValueError(f"it holds {text}, which is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_constant(text)  # type: ignore[return-value]


def _keep_one_run(
    saved: Saved, places: list[tuple[Path, int]], same: Mapping[str, Callable[[dict], Any]]
) -> None:
    """Leave out rows of other settings than most of the rows have."""
    for name, value in same.items():
        counts = Counter(value(row) for row in saved.rows)
        if len(counts) < 2:
            continue
        usual = counts.most_common(1)[0][0]
        strangers: dict[tuple, list[int]] = {}
        kept = []
        for row, (path, number) in zip(saved.rows, places, strict=True):
            if value(row) == usual:
                kept.append((row, (path, number)))
            else:
                strangers.setdefault((path, value(row)), []).append(number)
        for (path, found), numbers in strangers.items():
            lines = f"line {numbers[0]}" if len(numbers) == 1 else f"lines {_ranges(numbers)}"
            saved.complaints.append(f"{path} {lines}: {name} is {found}, in most rows {usual}: another run's")
        saved.rows, places[:] = [r for r, _ in kept], [p for _, p in kept]


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 7 as "1 to 3, 7"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in found)
