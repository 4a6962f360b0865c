"""FLUX.1 in diffusers: double-stream blocks are the structure stage, single-stream blocks the detail stage.

Facts (diffusers 0.36 to 0.42, models/transformers/transformer_flux.py): both kinds of block take
(hidden_states=img, encoder_hidden_states=txt, ...) and return (txt, img). ControlNet residuals are added to
img by the model's own loop after each block, so they pass through a cache untouched.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from h2cache.engines.base import Cut, Engine, Inputs
from h2cache.engines.divided import DividedBlocks
from h2cache.engines.forms import TwoStreams, argument

BLOCKS = TwoStreams(text_first=True)


class FluxDiffusers(DividedBlocks, Engine):
    """Engine of `diffusers.FluxTransformer2DModel` and its subclasses."""

    name = "FluxTransformer2DModel (diffusers)"
    serves = ("FluxTransformer2DModel",)
    cuts = (
        Cut("structure", "transformer_blocks", BLOCKS),
        Cut("detail", "single_transformer_blocks", BLOCKS, joint=True),
    )
    offers = frozenset({"modulated input", "modules", "output"})

    def inputs(self, args: tuple, kwargs: dict[str, Any]) -> Inputs:
        controlled = (
            argument(args, kwargs, 8, "controlnet_block_samples") is not None,
            argument(args, kwargs, 9, "controlnet_single_block_samples") is not None,
        )
        attention = argument(args, kwargs, 7, "joint_attention_kwargs") or {}
        adapters = attention.keys() & {"ip_adapter_image_embeds", "ip_hidden_states"}
        return Inputs(
            timestep=argument(args, kwargs, 3, "timestep"),
            latents=argument(args, kwargs, 0, "hidden_states"),
            text=argument(args, kwargs, 1, "encoder_hidden_states"),
            conditions=(*controlled, *_conditions(attention)),
            adds_between=any(controlled),
            attention_parts=3 if adapters else 2,
            targets=lambda: drawn_tokens(argument(args, kwargs, 4, "img_ids")),
        )

    def modulated_input(self, block: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        img, temb = argument(args, kwargs, 0, "hidden_states"), argument(args, kwargs, 2, "temb")
        return block.norm1(img, emb=temb)[0]

    def output_layer(self, transformer: Any) -> nn.Module:
        return transformer.proj_out


def _conditions(attention: dict[str, Any]) -> tuple:
    """The LoRA's scale and what else acts inside attention; IP-Adapter's states are added by the model."""
    if not attention:
        return (None,)
    return attention.get("scale"), *sorted(attention.keys() - {"scale", "ip_hidden_states"})


def drawn_tokens(img_ids: Tensor) -> slice | None:
    """The image tokens that are drawn: a reference image (Kontext, FLUX.2) has other first coordinates."""
    first = img_ids.reshape(-1, img_ids.shape[-2], img_ids.shape[-1])[0, :, 0]
    drawn = int((first == 0).sum())  # a wait, once a request
    return slice(drawn) if 0 < drawn < len(first) else None
