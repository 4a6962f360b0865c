"""A run as a picture: which steps were evaluated, and what was measured at each."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from h2cache.api import records_of
from h2cache.comfyui.cache import Run
from h2cache.records import FORCED, HIT, StepRecord

WIDTH, LEFT, RIGHT, CELL, LINE, CURVE = 960, 170, 24, 26, 22, 170  # pixels
WHITE, INK, PALE, SOFT = (255, 255, 255), (34, 38, 46), (226, 230, 236), (150, 158, 170)
EVALUATED, FORCED_HIT = (31, 95, 168), (196, 214, 236)
CURVES = ((200, 82, 30), (30, 130, 90))  # of the first and the second stage


def draw(run: Run) -> Tensor:
    """The trace as ComfyUI has pictures: (1, height, width, 3) in [0, 1]."""
    from PIL import Image, ImageDraw, ImageFont  # ComfyUI has it

    records = records_of([run.request])
    rows = list(dict.fromkeys((r.branch, r.stage) for r in records))
    stages = list(dict.fromkeys(r.stage for r in records))
    table = ("stage", " ", *stages)  # its columns need letters of one width; the text output has it
    lines = [line for line in str(run.summary).splitlines() if not line.startswith(table)]
    steps = max(len(run.steps), 1 + max((r.step for r in records), default=0))
    top = 16 + LINE
    bottom = top + len(rows) * (CELL + 6) + LINE
    measured = [r for r in records if r.measure is not None and math.isfinite(r.measure)]
    below = bottom + (CURVE + 40 if measured else 0)
    picture = Image.new("RGB", (WIDTH, below + len(lines) * LINE + 16), WHITE)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    step = (WIDTH - LEFT - RIGHT) / steps

    def x(n: float) -> float:
        return LEFT + n * step

    pen.text(
        (16, 12),
        "steps   blue: evaluated   pale: stood in for   light blue: so too, without a look",
        INK,
        font,
    )
    for n, row in enumerate(rows):
        y = top + n * (CELL + 6)
        pen.text((16, y + 5), " ".join(row), INK, font)
        for r in (r for r in records if (r.branch, r.stage) == row):
            colour = {HIT: PALE, FORCED: FORCED_HIT}.get(r.outcome, EVALUATED)
            pen.rectangle((x(r.step) + 1, y, x(r.step + 1) - 1, y + CELL), colour)
    every = max(1, math.ceil(28 / step))
    for n in range(0, steps, every):
        pen.text((x(n + 0.5), bottom - LINE + 2), str(n), SOFT, font, anchor="ma")
    if measured:
        _curves(pen, font, measured, stages, x, bottom + 10)
    for n, line in enumerate(lines):
        pen.text((16, below + n * LINE), line, INK, font)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]


def _curves(pen: Any, font: Any, measured: list[StepRecord], stages: list[str], x: Any, top: float) -> None:
    """What each stage measured, and the threshold that it was compared with."""
    highest = max(max(r.measure or 0, _finite(r.threshold)) for r in measured) or 1.0

    def y(value: float) -> float:
        return top + CURVE - value / highest * (CURVE - 10)

    pen.line((LEFT, top + CURVE, WIDTH - RIGHT, top + CURVE), SOFT)
    pen.text((LEFT - 8, y(highest)), f"{highest:.3g}", SOFT, font, anchor="rm")
    pen.text((LEFT - 8, y(0)), "0", SOFT, font, anchor="rm")
    pen.text((16, top), "measured", INK, font)
    for n, stage in enumerate(stages):
        colour = CURVES[n % len(CURVES)]
        if any(r.stage == stage for r in measured):
            pen.text((16, top + (n + 1) * LINE), stage, colour, font)
        for branch in dict.fromkeys(r.branch for r in measured):
            seen = [r for r in measured if (r.branch, r.stage) == (branch, stage)]
            points = [(x(r.step + 0.5), y(r.measure or 0)) for r in seen]
            pen.line([p for point in points for p in point], colour, 2)
            for (px, py), r in zip(points, seen, strict=True):
                pen.ellipse((px - 3, py - 3, px + 3, py + 3), colour)
                if _finite(r.threshold):
                    level = y(_finite(r.threshold))
                    pen.line((x(r.step), level, x(r.step + 1), level), colour)


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0
