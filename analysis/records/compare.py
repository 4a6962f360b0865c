"""How sure a mean over prompts is: bootstrap intervals, paired by prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean (or another statistic, under the same name) with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

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
