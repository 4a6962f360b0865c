"""Rows of contestants, compared prompt by prompt: means, paired differences, intervals, fronts, tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean (or another statistic, under the same name) with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __format__(self, form: str) -> str:
        """The mean with the ends in brackets, each in `form`; `f"{found:+.2f}"` for a difference."""
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"

    @property
    def shows_difference(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def bootstrap(values: list[float], statistic: Callable[..., Any] = np.mean) -> Interval:
    """The mean of `values` (for a comparison: the differences of pairs), resampled over prompts.

    statistic: what is taken in place of the mean, such as np.median. ValueError for no values.
    """
    if not len(values):
        raise ValueError("there is no value to take the mean of")
    numbers = np.asarray(values, float)
    draws = np.random.default_rng(0).integers(len(numbers), size=(RESAMPLES, len(numbers)))
    low, high = np.percentile(statistic(numbers[draws], axis=1), (2.5, 97.5))
    return Interval(float(statistic(numbers)), float(low), float(high))


def known(rows: Iterable[dict], name: str) -> list[float]:
    """`name` in those rows where it could be measured."""
    return [row[name] for row in rows if row.get(name) is not None]


def mean(rows: Iterable[dict], name: str) -> float | None:
    """The mean of `name`; None where no row has it."""
    values = known(rows, name)
    return fmean(values) if values else None


def groups(rows: Iterable[dict], name: str) -> dict[Any, list[dict]]:
    """The rows of each value of `name`, in the order in which they come."""
    found: dict[Any, list[dict]] = {}
    for row in rows:
        found.setdefault(row[name], []).append(row)
    return found


def times_fewer(mine: Iterable[dict], base: Iterable[dict], name: str = "blocks_run") -> float:
    """How many times less of `name` rows `mine` took than the rows `base` of the same prompts."""
    return sum(row[name] for row in base) / max(1, sum(row[name] for row in mine))


def paired(mine: list[dict], others: list[dict], name: str) -> Interval | None:
    """`name` in `mine` less that in `others`, prompt by prompt; None where no prompt has both."""
    theirs = {row["id"]: row[name] for row in others}
    pairs = [(row[name], theirs.get(row["id"])) for row in mine]
    found = [a - b for a, b in pairs if a is not None and b is not None]
    return bootstrap(found) if found else None


Point = TypeVar("Point")


def front(points: Sequence[Point], value: Callable[[Point], tuple[float, float]]) -> list[Point]:
    """The points that none beats in both numbers of `value`, of which more is better, by the first one."""
    kept: list[Point] = []
    for point in sorted(points, key=value, reverse=True):
        if not kept or value(point)[1] > value(kept[-1])[1]:
            kept.append(point)
    return kept[::-1]


def as_table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table; a cell that is None is a dash."""

    def line(row: Iterable[Any]) -> str:
        texts = ("-" if cell is None else str(cell) for cell in row)
        return "|" + "".join(f" {text} |" if text else " |" for text in texts)

    return [line(heads), "|---" * len(heads) + "|", *map(line, rows)]


def number(value: float | Interval | None, form: str, scale: float = 1.0) -> str | None:
    """A number as text, for `as_table`; None stays."""
    return None if value is None else format(value * scale if scale != 1 else value, form)
