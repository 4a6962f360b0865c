"""HunyuanVideo and HunyuanImage-2.1 in diffusers: double-stream blocks are structure, single-stream detail.

Facts (diffusers 0.42, models/transformers/transformer_hunyuan_video.py and transformer_hunyuanimage.py): both
kinds of block take (img, txt, temb, ...) and return (img, txt), image first. The text is padded to a fixed
length and masked in attention only, so both checks look at image tokens: padding rows must not enter a mean.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from h2cache.engines.base import Cut, Engine, Inputs
from h2cache.engines.divided import DividedBlocks
from h2cache.engines.forms import TwoStreams, argument

BLOCKS = TwoStreams(text_first=False)


class HunyuanDiffusers(DividedBlocks, Engine):
    """Engine of `HunyuanVideoTransformer3DModel` and `HunyuanImageTransformer2DModel` of diffusers."""

    name = "HunyuanVideoTransformer3DModel, HunyuanImageTransformer2DModel (diffusers)"
    serves = ("HunyuanVideoTransformer3DModel", "HunyuanImageTransformer2DModel")
    cuts = (
        Cut("structure", "transformer_blocks", BLOCKS),
        Cut("detail", "single_transformer_blocks", BLOCKS),
    )
    offers = frozenset({"modulated input", "modules", "output"})
    joined_text = "last"

    def inputs(self, args: tuple, kwargs: dict[str, Any]) -> Inputs:
        return Inputs(
            timestep=argument(args, kwargs, 1, "timestep"),
            latents=argument(args, kwargs, 0, "hidden_states"),  # (B, C, F, H, W), of a picture (B, C, H, W)
            text=argument(args, kwargs, 2, "encoder_hidden_states"),
            conditions=((kwargs.get("attention_kwargs") or {}).get("scale"),),
            adds_between=False,
        )

    def modulated_input(self, block: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        img, _, temb, *rest = args
        first_frame = rest[2:]  # (embedding, tokens), of video: another embedding where a picture was given
        if first_frame and first_frame[0] is not None:
            return block.norm1(img, temb, *first_frame)[0]
        return block.norm1(img, emb=temb)[0]

    def output_layer(self, transformer: Any) -> nn.Module:
        return transformer.proj_out
