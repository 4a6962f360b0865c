"""Claims of ours and of the paper, each with a verdict from the records of a model.

A method's value at a ratio of blocks is that of the setting within 3 % of it; else it lies, picture by
picture, on the line between its two nearest settings.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from analysis.figures import style
from analysis.figures.separation import WINDOWS, leaning, spans
from analysis.records.compare import Interval, bootstrap, groups, times_fewer
from analysis.records.models import Rows

RATIOS, NEAR = (5.0, 3.0), 0.03
GRID, TUNED, FEWER = "plan file=none", "plan", "fewer_steps"
REUSE = ("block_cache", "teacache", "magcache", "h2cache")
REUSED, FORECAST = "h2cache", "h2cache predictor=taylor"
POOLED = "h2cache window1=2 window2=12"  # the paper's shares at 1024x1024
YES, NO, OPEN, NONE = "yes", "no", "not shown", "not measured"
Values = dict[str, float]  # by picture


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


def gain(rows: Rows, a: str, b: str, ratio: float = RATIOS[0], what: str = "psnr") -> Interval | None:
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


def better(rows: Rows, a: str, b: str, limit: float = 0.0) -> Verdict:
    """Whether line `a` is more than `limit` dB above line `b`, at the first ratio with values of both."""
    for ratio in RATIOS:
        if found := gain(rows, a, b, ratio):
            verdict, text = above(found, limit)
            return verdict, text + f" at {ratio:g}x" * (ratio != RATIOS[0])
    return NONE, ""


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


def stages_differ(frozen: Rows) -> Verdict:
    """Whether freezing the second stage spoils high frequencies more than freezing the first does.

    frozen: rows of `analysis.separation`.
    """
    windows = spans(frozen[0]["steps"])[:WINDOWS] if frozen else []
    more: dict[str, list[float]] = {}  # octaves, by picture
    for span in windows:
        first, second = (leaning(frozen, stage, span) for stage in ("structure", "detail"))
        for picture in first.keys() & second.keys():
            more.setdefault(picture, []).append(second[picture] - first[picture])
    if not more:
        return NONE, ""
    found = bootstrap([fmean(more[picture]) for picture in sorted(more)])
    return above(found)[0], f"{found:+.2f} octaves of error"


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


SEPARATION = "structure is in the first stage, detail in the second"  # by `stages_differ`
CLAIMS: dict[str, Callable[[Rows], Verdict]] = {
    "the plan (default grid) is closest to the uncached picture, of all methods": ahead_of_all,
    "the plan is closer than fewer steps": lambda rows: better(rows, GRID, FEWER),
    "its default grid is within 3 dB of the tuned one": grid_is_near,
    "its pictures are right as often as uncached ones": right_as_uncached,
    "payback is better than none (Taylor in the paper's rule)": lambda rows: better(
        rows, f"{FORECAST} repay=true", FORECAST
    ),
    "a forecast in the paper's rule is better than reuse": lambda rows: better(rows, FORECAST, REUSED),
    "two thresholds are better than one (Block Cache)": lambda rows: better(rows, REUSED, "block_cache"),
    "pooled summaries (PFS) cost no more than 0.5 dB": lambda rows: better(rows, POOLED, REUSED, -0.5),
    "Hermite is better than Taylor (HiCache, TaylorSeer)": lambda rows: better(rows, "hicache", "taylorseer"),
    "reuse is closer than fewer steps": reuse_beats_fewer,
}


def name(line: str) -> str:
    return style.look(line).name
