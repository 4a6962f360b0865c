"""What becomes of a family's pipeline under each method: it runs, is refused, or fails."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import torch
from diffusers import DiffusionPipeline

import h2cache
from analysis.cli import progress
from analysis.settings import config_of
from analysis.tiny_families import FAMILIES
from h2cache import MethodConfig
from h2cache.presets import PRESETS

STEPS = 5


RUNS, FIT, REFUSED, FAILED, MEASURED = "runs", "runs, once fitted", "refused", "FAILED", "measured"


CHECKPOINTS = {"flux": "tiny_flux"}  # of which family our measured checkpoints are
STAND_IN = {  # for constants fitted to a checkpoint
    "coefficients": (0.0, 0.0, 0.0, 1.0, 0.0),
    "ratios": (1.0, 1.0, 1.0),
    "times": (0.5,),
    "by_latents": (1.0,),
    "by_time": (1.0,),
}


def outcome(pipeline: DiffusionPipeline, call: dict, config: MethodConfig) -> tuple[str, str]:
    """What becomes of one call under the method of `config`, and the reason where it does not run."""
    stand_ins = {f.name: STAND_IN[f.name] for f in fields(config) if f.name in STAND_IN}
    for settings, good in ((config, RUNS), (replace(config, **stand_ins), FIT)):
        try:
            h2cache.enable(pipeline, settings)
        except (ValueError, MemoryError) as error:
            reason = str(error)
            continue
        try:
            pipeline(**call, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
            return (good, "") if h2cache.step_records(pipeline) else (FAILED, "no step was recorded")
        except MemoryError as error:  # calculated before the first block
            reason = str(error)
        except Exception as error:  # a refusal names its method; what else is wrong with a call is a fault
            if not (isinstance(error, ValueError) and re.search(rf"\b{settings.name}\b", str(error))):
                return FAILED, f"{type(error).__name__}: {error}"
            reason = str(error)
        finally:
            h2cache.disable(pipeline)
    return REFUSED, reason


def measured(family: str, method: str) -> bool:
    """Whether a preset of `method` was measured by us on a checkpoint of `family`."""
    ours = [p for p in PRESETS.values() if p.ours and p.model == CHECKPOINTS.get(family)]
    return any(p.config.name == method for p in ours)


def trial(families: list[str], methods: list[str]) -> dict[str, dict]:
    """Family by family: the pipeline class, its transformer, and the outcome under each method."""
    rows = {}
    for family in progress(families, "model"):
        pipeline, call = FAMILIES[family]()
        cells = {}
        for method in methods:
            found, reason = outcome(pipeline, call, config_of(method))
            found = MEASURED if found in (RUNS, FIT) and measured(family, method) else found
            reason = re.sub(r"; the engine of .* cannot give that", ", which its engine cannot give", reason)
            cells[method] = {"outcome": found} | ({"reason": reason} if reason else {})
        rows[family] = {
            "pipeline": type(pipeline).__name__,
            "transformer": type(pipeline.transformer).__name__,
            "methods": cells,
        }
    return rows
