"""FLUX.2 in diffusers: double-stream blocks are the structure stage, single-stream blocks the detail stage.

Facts (diffusers 0.42, models/transformers/transformer_flux2.py): double blocks take (img, txt, ...) and
return (txt, img); the model then joins the streams, and single blocks take and return the joined tensor. With
a key and value cache (Klein KV) the first call has the tokens of the reference before those of the image, the
others have none: what is stored does not fit, and the cache of each block is looked up by its index.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from h2cache.engines.base import Cut, Engine, Inputs
from h2cache.engines.flux_diffusers import drawn_tokens
from h2cache.engines.forms import Joined, TwoStreams, argument


class Flux2Diffusers(Engine):
    """Engine of `diffusers.Flux2Transformer2DModel`: FLUX.2 dev and Klein."""

    name = "Flux2Transformer2DModel (diffusers)"
    serves = ("Flux2Transformer2DModel",)
    cuts = (
        Cut("structure", "transformer_blocks", TwoStreams(text_first=True)),
        Cut("detail", "single_transformer_blocks", Joined(), joint=True),
    )
    offers = frozenset({"modulated input"})

    def inputs(self, args: tuple, kwargs: dict[str, Any]) -> Inputs:
        latents = argument(args, kwargs, 0, "hidden_states")
        attention = argument(args, kwargs, 6, "joint_attention_kwargs") or {}
        mode = argument(args, kwargs, 9, "kv_cache_mode")
        references = argument(args, kwargs, 10, "num_ref_tokens") or 0 if mode == "extract" else 0
        return Inputs(
            timestep=argument(args, kwargs, 2, "timestep"),
            latents=latents[:, references:],
            text=argument(args, kwargs, 1, "encoder_hidden_states"),
            conditions=(mode, attention.get("scale")),
            adds_between=mode is not None,
            targets=lambda: None if mode else drawn_tokens(argument(args, kwargs, 3, "img_ids")),
        )

    def modulated_input(self, block: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        img = argument(args, kwargs, 0, "hidden_states")
        modulation = argument(args, kwargs, 2, "temb_mod_img")  # (B, 6 * C), or (B, 1 or I, 6 * C)
        modulation = modulation.unsqueeze(1) if modulation.ndim == 2 else modulation
        shift, scale = modulation.chunk(6, dim=-1)[:2]
        return (1 + scale) * block.norm1(img) + shift
