"""When to compute: decisions on measured changes, as plain functions of numbers on the host."""

import math
from dataclasses import dataclass


def below(changes: list[float], thresholds: list[float]) -> list[bool]:
    """Which samples changed by strictly less than their threshold; a non-finite change never does."""
    return [math.isfinite(c) and c < t for c, t in zip(changes, thresholds, strict=True)]


@dataclass(frozen=True)
class SmartThreshold:
    """The adaptive threshold that the H2-Cache authors ship switched off.

    Low at both ends of the denoising and high in the middle (`bell`), and lowered while measured changes are
    large (an exponential mean of them). One object serves both stages; the mean lives with the caller.
    """

    lowest: float = 0.05  # threshold at the first and last step
    highest: float = 0.5  # threshold in the middle of the run
    rate: float = 0.125  # weight of a new change in the running mean
    gain: float = 1.0  # how strongly the mean lowers the threshold

    def bell(self, step: int, total: int) -> float:
        """Ceiling of the threshold at `step` of `total` (0-based)."""
        x = (step + 0.5) / total - 0.5
        return self.lowest + (self.highest - self.lowest) * max(0.0, 1.0 - 4.0 * x * x)

    def threshold(self, step: int, total: int, mean: float | None) -> float:
        """Threshold at `step`, given the running mean of the changes (None before the first measured one)."""
        ceiling = self.bell(step, total)
        if mean is None:
            return ceiling
        reactive = max(self.lowest, self.highest - self.gain * mean)
        return max(self.lowest / 2, min(ceiling, reactive))

    def update(self, mean: float | None, change: float) -> float | None:
        """The running mean after a measured `change`; a non-finite change leaves it alone."""
        if not math.isfinite(change):
            return mean
        mean = mean or 0.0
        return mean + self.rate * (change - mean)


def interval_due(step: int, interval: int, warmup: int, rule: str = "authors") -> bool:
    """Whether a fixed schedule computes `step`: the first `warmup` steps, then every `interval`-th.

    rule: "authors", counted from the last warm-up step (TaylorSeer, HiCache, ClusCa; cache-dit's is the
    same); "diffusers", as its `TaylorSeerCacheConfig` counts, from the second step behind the warm-up.
    """
    start = warmup - 1 if rule == "authors" else warmup + 1
    return step < warmup or (step - start) % interval == 0
