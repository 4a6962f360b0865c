"""Z-Image in diffusers: one list of blocks, the first third is the structure stage.

Facts (diffusers 0.42, models/transformers/transformer_z_image.py): the model takes lists, one tensor for each
sample, and a time that rises from 0 to 1. Blocks take and return one tensor, of each sample the image tokens,
then the text, padded at the end (omni mode: text, images, further features). Guidance puts [cond, uncond]
into one batch: one decision for both halves.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from h2cache.engines.base import Engine, Inputs, one_stack
from h2cache.engines.forms import OneStream, argument


class ZImageDiffusers(Engine):
    """Engine of `diffusers.ZImageTransformer2DModel`."""

    name = "ZImageTransformer2DModel (diffusers)"
    serves = ("ZImageTransformer2DModel",)
    cuts = one_stack("layers", OneStream())

    def inputs(self, args: tuple, kwargs: dict[str, Any]) -> Inputs:
        x, texts = argument(args, kwargs, 0, "x"), argument(args, kwargs, 2, "cap_feats")
        omni = isinstance(x[0], list)
        latents, text = (x[0][-1], texts[0][0]) if omni else (x[0], texts[0])  # (C, F, H, W), (S, C)
        return Inputs(
            timestep=1 - argument(args, kwargs, 1, "t"),
            latents=latents.expand(len(x), *latents.shape),
            text=text,
            conditions=((kwargs.get("joint_attention_kwargs") or {}).get("scale"),),
            adds_between=kwargs.get("controlnet_block_samples") is not None,
            targets=lambda: None if omni else slice(min(_tokens(sample, kwargs) for sample in x)),
            guided=lambda: not omni and _same_halves(x),
        )


def _tokens(latents: Tensor, kwargs: dict[str, Any]) -> int:
    """Image tokens of one sample (C, F, H, W), padding left out."""
    frames, patch = kwargs.get("f_patch_size", 1), kwargs.get("patch_size", 2)
    return math.prod(latents.shape[1:]) // (frames * patch * patch)


def _same_halves(x: list[Tensor]) -> bool:
    half = len(x) // 2
    return len(x) % 2 == 0 and all(a.equal(b) for a, b in zip(x[:half], x[half:], strict=True))
