"""Rows of contestants, compared prompt by prompt: means, paired differences, intervals, fronts, tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any, TypeVar

import numpy as np

from analysis.figures import style
from h2cache.presets import PRESETS

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


METRICS = {  # field: axis label, higher is better
    "psnr": ("PSNR against uncached, dB", True),
    "ssim": ("SSIM against uncached", True),
    "gmsd": ("GMSD against uncached", False),
    "words_read": ("words read, change against uncached", True),
    "clip_iqa": ("CLIP-IQA, change against uncached", True),
}
ALONE = ("words_read", "clip_iqa")  # the uncached picture has a value too: shown is the paired difference


WINDOWS = ("window1=", "window2=")  # numbers that make another summary, not another speed


def lines_of(labels: list[str]) -> dict[str, str]:
    """The line that each contestant is a point of: its method, and what of its settings is a word.

    The words go where a method makes one line only, unless they have a look of their own.
    """

    def words(label: str) -> str:
        method, *settings = _spelt_out(label).split(" ")
        told = [s for s in settings if s.startswith(WINDOWS) or not _is_number(s.partition("=")[2])]
        return " ".join([method, *sorted(told)])

    lines = {label: words(label) for label in labels}
    several = Counter(line.split(" ")[0] for line in set(lines.values()))
    return {
        label: line if line in style.LOOKS or several[line.split(" ")[0]] > 1 else line.split(" ")[0]
        for label, line in lines.items()
    }


def _spelt_out(label: str) -> str:
    """A preset's label, `h2cache (tiny_flux-5x)`, as that of its settings; others as they are."""
    method, _, rest = label.partition(" (")
    preset = PRESETS.get(rest.removesuffix(")"))
    if preset is None:
        return label
    settings = sorted(preset.settings.items())
    return " ".join([method, *(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in settings)])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def points(rows: list[dict], metric: str) -> list[dict]:
    """One point for each contestant, in the order of the rows: cost, quality with interval."""
    line = lines_of(list(dict.fromkeys(row["label"] for row in rows)))
    base = {row["id"]: row for row in rows if row["method"] == "none"}
    found = []
    for label, mine in groups(rows, "label").items():
        uncached = [base[row["id"]] for row in mine]
        values = known(mine, metric)
        if not values:
            continue
        quality = (
            (paired(mine, uncached, metric) or bootstrap([0.0])) if metric in ALONE else bootstrap(values)
        )
        found.append({
            "label": label, "line": line[label], "method": mine[0]["method"], "prompts": len(mine),
            "blocks_ratio": times_fewer(mine, uncached),
            "speed_up": median(
                (r.get("seconds_uncached") or base[r["id"]]["seconds"]) / r["seconds"] for r in mine
            ),  # a row that joined another run's brings its own uncached time
            "mebibytes": max(r["bytes_held"] for r in mine) / 2**20,
            "mean": fmean(values), "quality": quality.mean, "low": quality.low, "high": quality.high,
        })  # fmt: skip
    return found


def at(found: list[dict], line: str, ratio: float, what: str = "quality") -> float | None:
    """`what` of a line at `ratio` times fewer blocks, between its measured points; None beyond them."""
    mine = sorted((p for p in found if p["line"] == line), key=lambda p: p["blocks_ratio"])
    x = [p["blocks_ratio"] for p in mine]
    if len(x) < 2 or not x[0] <= ratio <= x[-1]:
        return None
    return float(np.interp(ratio, x, [p[what] for p in mine]))


def lines(rows: list[dict]) -> list[dict[str, Any]]:
    """One line for each contestant, in the order of `rows`, compared with the baseline prompt by prompt.

    One that has no prompt in common with the finished pictures of the baseline has no line.
    """
    base = {row["id"]: row for row in rows if row["method"] == "none"}
    finished = groups([row for row in rows if row["id"] in base], "label")
    return [_line(label, mine, base) for label, mine in finished.items()]


def _line(label: str, mine: list[dict], base: dict[str, dict]) -> dict[str, Any]:
    uncached = [base[row["id"]] for row in mine]

    def difference(name: str) -> Interval | None:
        return paired(mine, uncached, name) if label != "none" else None

    seconds, psnr = known(mine, "seconds"), known(mine, "psnr")
    ratios = [b["seconds"] / row["seconds"] for row, b in zip(mine, uncached, strict=True)]
    return {
        "label": label,
        "method": mine[0]["method"],
        "config": mine[0]["config"],
        "prompts": len(mine),
        "blocks_ratio": times_fewer(mine, uncached),
        "blocks_run": mean(mine, "blocks_run"),
        "speed_up": median(ratios),
        "speed_up_interval": _ends(bootstrap(ratios, np.median)),
        "seconds_mean": fmean(seconds),
        "seconds_sd": stdev(seconds) if len(seconds) > 1 else None,
        "seconds_median": median(seconds),
        "seconds_steps": _median(known(mine, "seconds_steps")),
        "tflops": mean(mine, "tflops"),
        "psnr": mean(mine, "psnr"),
        "psnr_interval": _ends(bootstrap(psnr)) if psnr else None,
        "psnr_worst": min(psnr, default=None),
        "identical": sum(row["identical"] for row in mine),
        **{name: mean(mine, name) for name in ("ssim", "ms_ssim", "gmsd", "lpips", "words_read", "clip_iqa")},
        "words_difference": _difference(difference("words_read")),
        "clip_iqa_difference": _difference(difference("clip_iqa")),
        "peak_bytes": max((row["peak_bytes"] for row in mine if row["peak_bytes"]), default=None),
        "peak_kind": mine[0]["peak_kind"],
        "bytes_held": max(row["bytes_held"] for row in mine),
    }


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _ends(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def _difference(interval: Interval | None) -> dict | None:
    if interval is None:
        return None
    return {"mean": interval.mean, "interval": _ends(interval), "shown": interval.shows_difference}
