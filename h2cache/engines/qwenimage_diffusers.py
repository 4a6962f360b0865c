"""Qwen-Image and Qwen-Image-Edit in diffusers: one list of blocks, the first third is the structure stage.

Facts (diffusers 0.42, models/transformers/transformer_qwenimage.py): blocks take (img, txt, ...) and return
(txt, img). In editing the tokens of the reference images follow those of the image; `img_shapes` tells how
many are whose. ControlNet residuals are added by the model's own loop after each block.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from h2cache.engines.base import Engine, Inputs, Modules, one_stack
from h2cache.engines.divided import double_block
from h2cache.engines.forms import TwoStreams, argument


class QwenImageDiffusers(Engine):
    """Engine of `diffusers.QwenImageTransformer2DModel`: text to image, edit and edit-plus."""

    name = "QwenImageTransformer2DModel (diffusers)"
    serves = ("QwenImageTransformer2DModel",)
    cuts = one_stack("transformer_blocks", TwoStreams(text_first=True))
    offers = frozenset({"modulated input", "modules", "output"})

    def inputs(self, args: tuple, kwargs: dict[str, Any]) -> Inputs:
        controlled = argument(args, kwargs, 7, "controlnet_block_samples") is not None
        attention = argument(args, kwargs, 6, "attention_kwargs") or {}
        layered = argument(args, kwargs, 8, "additional_t_cond") is not None  # draws several layers at once
        shapes = argument(args, kwargs, 4, "img_shapes")
        return Inputs(
            timestep=argument(args, kwargs, 3, "timestep"),
            latents=argument(args, kwargs, 0, "hidden_states"),
            text=argument(args, kwargs, 1, "encoder_hidden_states"),
            conditions=(controlled, attention.get("scale")),
            adds_between=controlled,
            targets=lambda: None if layered else _drawn(shapes),
        )

    def modulated_input(self, block: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        img, temb = argument(args, kwargs, 0, "hidden_states"), argument(args, kwargs, 3, "temb")
        modulation, _ = block.img_mod(temb).chunk(2, dim=-1)  # of attention and of the mlp
        index = argument(args, kwargs, 6, "modulate_index")  # none before diffusers 0.37
        further = () if index is None else (index,)
        return block._modulate(block.img_norm1(img), modulation, *further)[0]

    def modules(self, block: Any) -> Modules:
        return double_block(block.attn, block.img_mlp, block.txt_mlp)

    def output_layer(self, transformer: Any) -> nn.Module:
        return transformer.proj_out


def _drawn(shapes: list) -> slice | None:
    """Image tokens of the picture itself; the shapes (frames, height, width) of references follow its own."""
    first = shapes[0]
    return slice(math.prod(first[0])) if isinstance(first, list) and len(first) > 1 else None
