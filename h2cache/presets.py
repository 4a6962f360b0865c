"""Named settings, each with the model, steps, size and machine they were measured on.

A threshold is a property of a model (and of image size and step count): no entry without a measurement.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from h2cache.h2 import H2Config
from h2cache.method import MethodConfig


@dataclass(frozen=True)
class Preset:
    """Settings and where they come from."""

    model: str  # last part of the folder or hub id
    config: MethodConfig
    steps: int
    size: str
    source: str  # command, machine and date of our measurement, or the publication


PRESETS: dict[str, Preset] = {
    "flux1-dev": Preset(
        model="FLUX.1-dev",
        config=H2Config(tau1=0.15, tau2=0.22),
        steps=100,
        size="1024x1024",
        source="published: arXiv 2510.27171, 5.08x at -0.07 % CLIP-IQA on CUTE80; not measured by us",
    ),
}


def find_preset(model: str, method: str) -> Preset | None:
    """The first preset of `method` for `model` (folder or hub id); None if there is none."""
    last = re.split(r"[/\\]", model.rstrip("/\\"))[-1]
    return next((p for p in PRESETS.values() if p.model == last and p.config.name == method), None)
