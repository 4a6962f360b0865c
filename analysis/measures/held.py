"""Bytes that a method keeps from step to step: calculated, counted by the method, and in memory."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any

import torch
from diffusers import DiffusionPipeline

import h2cache
from analysis.cli import progress
from analysis.measures.families import STAND_IN, STEPS
from analysis.records.compare import as_table
from analysis.settings import config_of
from analysis.tiny_families import FAMILIES
from h2cache import MethodConfig
from h2cache.engines import engines
from h2cache.method import Shape

SLACK = 64  # bytes: single numbers, such as timesteps
MODELS = {  # by size: the class that has it, and its hidden states in bfloat16
    "FLUX.1 1024": ("FluxTransformer2DModel", Shape((19, 38), 4096, 512, 3072, 64)),
    "FLUX.2 dev 1024": ("Flux2Transformer2DModel", Shape((8, 48), 4096, 512, 6144, 128)),
    "Qwen-Image 1328": (
        "QwenImageTransformer2DModel",
        Shape((60, 0), 6889, 512, 3072, 64, text_compared=False),
    ),
    "HunyuanImage 2048": (
        "HunyuanImageTransformer2DModel",
        Shape((20, 40), 4096, 1128, 3584, 64, text_compared=False),
    ),
    "HunyuanVideo 720p": (
        "HunyuanVideoTransformer3DModel",
        Shape((20, 40), 118800, 256, 3072, 64, text_compared=False),
    ),
    "Wan 14B 720p": ("WanTransformer3DModel", Shape((40, 0), 75600, 0, 5120, 64)),
    "DiT-XL/2 256": ("DiTTransformer2DModel", Shape((28, 0), 256, 0, 1152, 32, batch=2)),
    "Inf-DiT 2048": ("BaseTransformer", Shape((28, 0), 262144, 0, 1280, 48)),
}


@dataclass(frozen=True)
class Held:
    """The most in one call of a pipeline, over all guidance branches."""

    needed: int  # calculated before the first block
    counted: int  # by the library
    alive: int  # of all tensors' storages, more than without a cache

    @property
    def fits(self) -> bool:
        """Whether no more is in memory than was counted, and no more counted than calculated."""
        return self.alive - SLACK <= self.counted <= self.needed + SLACK


def alive() -> int:
    """Bytes of the storages of all tensors that somebody holds, each once, but of those frozen by gc."""
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    storages = [t.untyped_storage() for t in tensors if t.layout is torch.strided]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def course_of(pipeline: DiffusionPipeline, call: dict) -> list[int]:
    """`alive` after each step of a call, when all guidance branches have given their outputs."""
    found: list[int] = []
    scheduler, own = pipeline.scheduler, pipeline.scheduler.step

    @wraps(own)  # pipelines look at its signature
    def step(*args: Any, **kwargs: Any) -> Any:
        stepped = own(*args, **kwargs)
        # Who has looked at a frame's variables keeps them as they were (Python to 3.12): look again.
        sys._getframe(1).f_locals  # noqa: B018
        found.append(alive())
        return stepped

    gc.collect()  # of what other runs left
    scheduler.step = step
    try:
        pipeline(**call, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
    finally:
        del scheduler.step
    return found


@contextmanager
def only_new() -> Iterator[None]:
    """Within it `alive` looks at what was made in it: a model has a million objects of its own."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def held(pipeline: DiffusionPipeline, call: dict, config: MethodConfig, plain: list[int]) -> Held | str:
    """What one call under `config` keeps, or why it is refused; plain: `course_of` without a cache."""
    stand_ins = {f.name: STAND_IN[f.name] for f in fields(config) if f.name in STAND_IN}
    try:
        h2cache.enable(pipeline, replace(config, **stand_ins))
        found = course_of(pipeline, call)
        summary = h2cache.summary(pipeline)
    except (ValueError, MemoryError) as error:
        return str(error)
    finally:
        h2cache.disable(pipeline)
    most = max(now - before for now, before in zip(found, plain, strict=False))  # fewer_steps takes fewer
    return Held(summary.bytes_needed, summary.bytes_held, max(0, most))


def table_of_models(methods: list[str]) -> str:
    """MiB of every method on every model at its usual size; a dash where the engine cannot serve it."""
    engine_of = {served: engine for engine in engines() for served in engine.serves}
    rows = []
    for text in methods:
        config, row = config_of(text), [text]
        for name, shape in MODELS.values():
            served = config.requires <= engine_of[name].offers | {"whole"}
            row.append(f"{config.bytes_needed(shape) / 2**20:.1f}" if served else "-")
        rows.append(row)
    return "\n".join(as_table(["MiB", *MODELS], rows))


def check(methods: list[str], families: list[str]) -> tuple[str, int]:
    """The bytes of every method on the small models, and how many pairs keep more than they say."""
    rows, wrong = [], 0
    for family in progress(families, "model"):
        pipeline, call = FAMILIES[family]()
        pipeline.set_progress_bar_config(disable=True)
        with only_new():
            plain = course_of(pipeline, call)
            for text in methods:
                found = held(pipeline, call, config_of(text), plain)
                if isinstance(found, Held):
                    note = "" if found.fits else "more than it says"
                    wrong += not found.fits
                    rows.append([family, text, found.needed, found.counted, found.alive, note])
    return "\n".join(as_table(["model", "method", "calculated", "counted", "in memory", ""], rows)), wrong
