"""Named settings, each with the model, steps and size they hold for, and where that is known from.

A threshold is a property of a model (and of image size and step count). Those of the embedded model were
measured by us, with command, machine and records; `flux1-dev` was published by the paper's authors, not
measured by us.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from h2cache.method import MethodConfig
from h2cache.registry import find_method


@dataclass(frozen=True)
class Preset:
    """Settings and where they come from."""

    model: str  # last part of the folder or hub id
    method: str
    settings: dict[str, Any]  # of the method, where they are not its defaults
    steps: int
    size: str
    source: str  # command, machine and date of our measurement, or the publication
    ours: bool = True  # measured by us; else published by others

    @property
    def config(self) -> MethodConfig:
        """The method with these settings."""
        return find_method(self.method)(**self.settings)

    def mismatch(self, model: str, steps: int, size: str | None) -> str | None:
        """A sentence if `model` (folder or hub id), `steps` or `size` (None: not known) are others."""
        here = [last_part(model)] if last_part(model) != self.model else []
        here += [f"{steps} steps"] if steps != self.steps else []
        here += [size] if size not in (None, self.size) else []
        if not here:
            return None
        known = "were measured" if self.ours else "were published by others, not measured by us,"
        return (
            f"the preset's settings {known} on {self.model} at {self.steps} steps and {self.size}; here: "
            f"{', '.join(here)}. Speed and fidelity may be others"
        )


_TINY = (
    "python -m analysis.calibrate --pairs 0.06/0.02 0.12/0.02 0.2/0.05 0.35/0.2 0.5/0.2 0.5/0.3 inf/inf/29, "
    "AMD EPYC, 1 thread, 2026-11-21, 32 prompts: assets/results/tiny_flux_presets"
)


def _tiny(measured: str, **settings: float) -> Preset:
    return Preset("tiny_flux", "h2cache", settings, 50, "128x128", f"{measured}. {_TINY}")


_BASELINES = (
    "python -m analysis.experiment --prompts assets/prompts/tiny32.jsonl --no-words --methods block_cache:"
    "threshold=0.19,0.2,0.21,0.22 teacache:threshold=0.135,0.14,0.145,0.15 fewer_steps:factor=5,5.5, "
    "AMD EPYC, 1 thread, 2026-11-21, 32 prompts: assets/results/tiny_flux_baselines"
)


def _baseline(method: str, measured: str, **settings: float) -> Preset:
    return Preset("tiny_flux", method, settings, 50, "128x128", f"{measured}. {_BASELINES}")


PRESETS: dict[str, Preset] = {  # the first of a model is its default
    "flux1-dev": Preset(
        model="FLUX.1-dev",
        method="h2cache",
        settings={"tau1": 0.15, "tau2": 0.22},
        steps=100,
        size="1024x1024",
        source="published: arXiv 2510.27171, 5.08x at -0.07 % CLIP-IQA on CUTE80; not measured by us",
        ours=False,
    ),
    "tiny_flux-5x": _tiny("5.16x fewer blocks, 31.7 dB", tau1=0.35, tau2=0.2),
    "tiny_flux-2x": _tiny("2.01x fewer blocks, 48.6 dB", tau1=0.06, tau2=0.02),
    "tiny_flux-3x": _tiny("3.08x fewer blocks, 41.9 dB", tau1=0.12, tau2=0.02),
    "tiny_flux-4x": _tiny("4.01x fewer blocks, 37.4 dB", tau1=0.2, tau2=0.05),
    "tiny_flux-6x": _tiny("6.25x fewer blocks, 26.9 dB", tau1=0.5, tau2=0.3),
    "tiny_flux-fastest": _tiny(
        "6.82x fewer blocks, 26.1 dB", tau1=float("inf"), tau2=float("inf"), max_consecutive_hits=29
    ),
    "tiny_flux-block_cache": _baseline("block_cache", "5.13x fewer blocks, 37.0 dB", threshold=0.21),
    "tiny_flux-teacache": _baseline("teacache", "5.21x fewer blocks, 37.5 dB", threshold=0.14),
    "tiny_flux-fewer_steps": _baseline("fewer_steps", "5.00x fewer blocks, 44.1 dB", factor=5.0),
}


def find_preset(model: str, method: str) -> Preset | None:
    """The first preset of `method` for `model` (folder or hub id); None if there is none."""
    last = last_part(model)
    return next((p for p in PRESETS.values() if p.model == last and p.method == method), None)


def last_part(model: str) -> str:
    """The name of a model: the last part of its folder or hub id."""
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1]
