"""Stable Diffusion 3 and 3.5 in diffusers: one list of blocks, the first third is the structure stage.

Facts (diffusers 0.42, models/transformers/transformer_sd3.py): blocks take (img, txt, temb, ...) and return
(txt, img), the last one no text. Guidance puts [uncond, cond] into one batch: one decision for both halves.
ControlNet residuals are added by the model's own loop after each block.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from h2cache.engines.base import Engine, Inputs, one_stack, same_halves
from h2cache.engines.forms import TwoStreams, argument
from h2cache.schedule import local_of

_SKIPS_LAYERS = (
    "skip-layer guidance leaves out blocks by itself, which a cache of blocks cannot follow: call the "
    "pipeline without skip_guidance_layers, or use the plan: h2cache.enable(pipe, speedup=5)"
)


class SD3Diffusers(Engine):
    """Engine of `diffusers.SD3Transformer2DModel`."""

    name = "SD3Transformer2DModel (diffusers)"
    serves = ("SD3Transformer2DModel",)
    cuts = one_stack("transformer_blocks", TwoStreams(text_first=True))
    offers = frozenset({"modulated input"})

    def check_request(self, pipeline: Any) -> None:
        if local_of(pipeline, "skip_guidance_layers"):  # it begins after some steps only
            raise ValueError(_SKIPS_LAYERS)

    def inputs(self, args: tuple, kwargs: dict[str, Any]) -> Inputs:
        if argument(args, kwargs, 7, "skip_layers"):
            raise ValueError(_SKIPS_LAYERS)
        latents = argument(args, kwargs, 0, "hidden_states")  # (B, C, H, W)
        attention = argument(args, kwargs, 5, "joint_attention_kwargs") or {}
        controlled = argument(args, kwargs, 4, "block_controlnet_hidden_states") is not None
        return Inputs(
            timestep=argument(args, kwargs, 3, "timestep"),
            latents=latents,
            text=argument(args, kwargs, 1, "encoder_hidden_states"),
            conditions=(controlled, attention.get("scale"), "ip_adapter_image_embeds" in attention),
            adds_between=controlled,
            guided=lambda: same_halves(latents),
        )

    def modulated_input(self, block: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        img, temb = argument(args, kwargs, 0, "hidden_states"), argument(args, kwargs, 2, "temb")
        return block.norm1(img, emb=temb)[0]
