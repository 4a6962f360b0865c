"""What the sections run: FLUX of random weights in real shapes, a loop over it, every method's settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor

from analysis.drawing.transformer import random_flux, random_inputs
from h2cache import MethodConfig, find_method, method_names

INF = math.inf
OFF = {
    "tau1": 0.0, "tau2": 0.0, "threshold": 0.0, "interval": 1, "max_drafts": 0, "speedup": 1.0, "budget": 99,
    "window": 1.0, "growth": 0.0,
}  # fmt: skip
FITTED = {  # random weights have no constants of their own
    "coefficients": (0.0, 0.0, 0.0, 1.0, 0.0),
    "ratios": (1.0, 1.02, 0.98, 0.95),
    "times": (0.0, 1.0),
    "by_latents": (1.0, 1.0),
    "by_time": (2.0, 1.0),
}
NARROW = {
    "in_channels": 16, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 48,
    "pooled_projection_dim": 32, "axes_dims_rope": (8, 12, 12),
}  # fmt: skip
SKIPPING = [name for name in method_names() if find_method(name).reuses]
SOME_HITS = {  # as many skipped as computed steps, from the start
    "tau1": INF, "tau2": INF, "threshold": INF, "max_consecutive_hits": 1, "interval": 2, "warmup_steps": 1,
    "retention": 0.0, "min_drafts": 1, "max_drafts": 1, "speedup": 2.0, "file": "none",
    "budget": 4, "early_threshold": INF,
}  # fmt: skip


def settings(method: str, **values: Any) -> MethodConfig:
    """The settings of `method` with those of `values` that it has, and constants for random weights."""
    kind = find_method(method)
    known = {f.name for f in fields(kind)}
    if method == "plan":  # it takes one wish only
        return kind(**{k: v for k, v in values.items() if k in known})
    return replace(kind(), **{k: v for k, v in (FITTED | values).items() if k in known})


def build(double: int, single: int, small: bool, device: str, dtype: torch.dtype) -> FluxTransformer2DModel:
    """FLUX.1-dev's transformer with so many blocks; small: 64 wide in place of 3072."""
    return random_flux(double, single, device, dtype, **(NARROW if small else {}))


def inputs_of(model: FluxTransformer2DModel, tokens: int, text: int, batch: int = 1, seed: int = 0) -> dict:
    """Arguments of a forward call for `batch` different square pictures."""
    return random_inputs(model.config, tokens, text, model.device, model.dtype, batch, seed)


def sample_of(inputs: dict, index: int) -> dict:
    """The arguments for one picture of a batch alone."""
    single = ("img_ids", "txt_ids")
    return {
        k: v[index : index + 1] if isinstance(v, Tensor) and k not in single else v for k, v in inputs.items()
    }


class Loop:
    """A pipeline's loop as diffusers writes them: scheduler, transformer, guidance branches; no more."""

    def __init__(self, model: FluxTransformer2DModel) -> None:
        self.transformer = model
        self.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)

    @torch.no_grad()
    def __call__(
        self,
        inputs: dict,
        steps: int,
        around: Callable[[int], Any] = lambda step: nullcontext(),
        texts: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """The latents after each step. around: a context for the model's call at each step.

        texts: a text for each guidance branch, which are averaged; empty: one branch, the text of `inputs`.
        """
        sigmas = [1 - n / steps for n in range(steps)]  # as FluxPipeline asks for
        self.scheduler.set_timesteps(sigmas=sigmas, device=self.transformer.device, mu=1.15)
        self.scheduler.set_begin_index(0)  # as pipelines do: looking for it would wait for the device
        given, found = dict(inputs), []
        latents = given.pop("hidden_states")
        texts = texts or (given["encoder_hidden_states"],)
        for step, t in enumerate(self.scheduler.timesteps):
            time, out = t.expand(latents.shape[0]) / 1000, []
            for branch, text in enumerate(texts):
                call = given | {"hidden_states": latents, "encoder_hidden_states": text, "timestep": time}
                with around(step), self.transformer.cache_context(f"branch {branch}"):
                    out.append(self.transformer(**call)[0])
            mean = out[0] if len(out) == 1 else torch.stack(out).mean(0)
            latents = self.scheduler.step(mean, t, latents, return_dict=False)[0]
            found.append(latents)
        return found


def synchronise(device: str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()
