"""The thresholds of a method, or its interval, for a wanted speed: found by measuring."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from h2cache.api import summary
from h2cache.h2 import H2Config
from h2cache.method import MethodConfig
from h2cache.studio import Studio
from h2cache.tuned import Quality

CLOSE = 0.03  # share by which a found threshold may miss the wanted speed
RATIOS = (0.5, 1.0, 2.0, 4.0, 8.0)  # tau1 / tau2 that are tried


@dataclass(frozen=True)
class Found:
    """The settings of a method that give a wanted speed."""

    config: MethodConfig
    speedup: float  # measured: times fewer executed blocks, mean over the prompts
    quality: Quality


def tune_thresholds(studio: Studio, kind: type[MethodConfig], speedup: float, progress: bool) -> Found:
    names = {f.name for f in fields(kind)}
    shapes: list[Callable[[float], dict[str, Any]]]
    if kind is H2Config:
        shapes = [partial(_taus, math.sqrt(ratio)) for ratio in RATIOS]
    elif "threshold" in names:
        shapes = [lambda x: {"threshold": x}]
    elif "interval" in names:
        shapes = [lambda x: {"interval": max(1, round(x * 10))}]
    else:
        raise ValueError(f"{kind.name} has neither thresholds nor an interval to tune")
    bar = tqdm(total=len(shapes), disable=not progress, unit="shape")
    found: list[Found] = []
    try:
        for shape in shapes:
            found.append(_at_speed(studio, kind, shape, speedup))
            best = _best(found, speedup)
            bar.set_postfix_str(f"{best.speedup:.2f}x, {best.quality.mean:.2f} dB")
            bar.update()
    except KeyboardInterrupt:
        if not found:
            raise
    finally:
        bar.close()
    return _best(found, speedup)


def _taus(root: float, x: float) -> dict[str, Any]:
    return {"tau1": x * root, "tau2": x / root}


def _at_speed(
    studio: Studio, kind: type[MethodConfig], shape: Callable[[float], dict[str, Any]], speedup: float
) -> Found:
    """Bisection for the scale of `shape`, settings of `kind`, that gives the speed."""
    low, high, tried = 1e-3, 4.0, []
    for _ in range(12):
        middle = math.sqrt(low * high)
        tried.append(_speed_and_quality(studio, kind(**shape(middle))))
        if abs(tried[-1].speedup / speedup - 1) < CLOSE:
            break
        low, high = (middle, high) if tried[-1].speedup < speedup else (low, middle)
    return min(tried, key=lambda f: abs(f.speedup / speedup - 1))


def _speed_and_quality(studio: Studio, config: MethodConfig) -> Found:
    def one(number: int) -> tuple[float, float]:
        return max(0.0, studio.fidelity(number, config, saved=True)), summary(studio.pipe).block_ratio

    values, ratios = zip(*studio.measured(one), strict=True)
    return Found(config, math.fsum(ratios) / len(ratios), Quality.of(values))


def _best(found: Sequence[Found], speedup: float) -> Found:
    """The best pictures among those that are near the speed; else the nearest speed."""
    near = [f for f in found if f.speedup >= speedup * (1 - 2 * CLOSE)]
    return max(near, key=lambda f: f.quality.mean) if near else max(found, key=lambda f: f.speedup)
