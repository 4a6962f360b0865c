"""Which steps are evaluated, without any calibration.

Of a flow: equal distances in a mix of noise and log-SNR. Of other samplers (DDIM and similar ones, whose
timesteps are already spread as the noise asks): equal numbers of steps, which is far better on
`assets/tiny_dit`.

Of Heun's two steps at one noise level of a flow the first is evaluated, so that the second, above all the
last of a run, is forecast from its own level. With few evaluations the last steps of a run are forecast too,
so that what the gap before got wrong can be paid. Not with samplers that look back at outputs (UniPC, DPM++),
where this cost `tiny_wan` 5 dB, nor with Heun's where the model predicts no flow: there it cost `tiny_infdit`
9 dB.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from h2cache.schedule import Course

LAST_GAP = 0.2  # what is left after the last evaluation, of the usual gap: time to pay what is owed
SHARE = 0.2  # of log-SNR in the distance; 0 to 0.3 were best on every model that was tried


def default_steps(course: Course, count: int, to_end: bool = False) -> tuple[int, ...]:
    """`count` steps of a request, from the first to about the last, the first of each denoiser among them.

    to_end: to the very last, as with samplers where this is better.
    """
    wanted = min(count, course.steps)
    if wanted <= len(course.starts):
        return tuple(course.starts)
    places = (
        distances(course.levels[: course.steps])
        if course.flow
        else [n / course.steps for n in range(course.steps)]
    )
    steps = _spread(course, places, wanted, to_end or course.multistep) | set(course.starts)
    while len(steps) > wanted:  # a denoiser's first step came in: the nearest neighbours become one
        free = sorted(steps - set(course.starts))
        steps.discard(min(free, key=lambda s: _room(s, steps, places)))
    while len(steps) < wanted:
        steps.add(_widest(sorted(steps), places, course.steps))
    return tuple(sorted(steps))


def _spread(course: Course, places: Sequence[float], count: int, to_end: bool) -> set[int]:
    """`count` steps at equal distances from the first on, or fewer where they fall together."""
    levels = course.levels
    steps = [n for n in range(course.steps) if n == 0 or levels[n] != levels[n - 1]]
    to_end = to_end or (len(steps) < course.steps and not course.flow)
    if len(steps) < count or not course.flow:
        steps = [*range(course.steps)]
    left = 0.0 if to_end or count == 1 else LAST_GAP / (count - 1)
    where, numbers = [places[n] for n in steps], np.arange(len(steps))
    last = round(float(np.interp(where[-1] / (1 + left), where, numbers)))
    nearest = np.interp(np.linspace(where[0], where[last], count), where, numbers)
    return {steps[round(n)] for n in nearest}


def distances(levels: Sequence[float]) -> list[float]:
    """How far each step is from the first: rising, 0 to 1, for noise levels that fall within [0, 1]."""
    s = np.clip(np.asarray(levels, float), 1e-3, 1 - 1e-3)
    snr = np.log((1 - s) / s)
    parts = [
        (part - part[0]) / (part[-1] - part[0]) if part[-1] > part[0] else part * 0 for part in (-s, snr)
    ]
    mixed = np.maximum.accumulate((1 - SHARE) * parts[0] + SHARE * parts[1])
    return (mixed + np.arange(len(mixed)) * 1e-9).tolist()  # strictly: steps may share a level (Heun)


def _room(step: int, steps: set[int], places: list[float]) -> float:
    """How far the neighbours of `step` lie apart."""
    before, after = [s for s in steps if s < step], [s for s in steps if s > step]
    return places[min(after, default=step)] - places[max(before, default=step)]


def _widest(steps: list[int], places: list[float], end: int) -> int:
    """A step in the middle of the widest gap that has room."""
    edges = [*steps, end]
    gaps = [(places[min(b, end - 1)] - places[a], a, b) for a, b in pairwise(edges) if b - a > 1]
    _, a, b = max(gaps, key=lambda gap: (gap[0], gap[2] - gap[1]))
    return (a + b) // 2
