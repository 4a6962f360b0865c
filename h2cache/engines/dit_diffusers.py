"""DiT (class to image) in diffusers: one list of blocks, the first third is the structure stage.

Facts (diffusers 0.42, models/transformers/dit_transformer_2d.py): blocks take x, the timestep and the class,
and return x. Guidance puts [cond, uncond] into one batch: one decision for both halves, the larger of the two
measures [ours], as one picture comes of both.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from h2cache.engines.base import Engine, Inputs, Modules, one_stack, same_halves
from h2cache.engines.forms import OneStream, argument


class DiTDiffusers(Engine):
    """Engine of `diffusers.DiTTransformer2DModel`."""

    name = "DiTTransformer2DModel (diffusers)"
    serves = ("DiTTransformer2DModel",)
    cuts = one_stack("transformer_blocks", OneStream())
    offers = frozenset({"modulated input", "modules", "output"})

    def inputs(self, args: tuple, kwargs: dict[str, Any]) -> Inputs:
        latents = argument(args, kwargs, 0, "hidden_states")  # (B, C, H, W)
        return Inputs(
            timestep=argument(args, kwargs, 1, "timestep"),
            latents=latents,
            text=argument(args, kwargs, 2, "class_labels"),
            conditions=(),
            adds_between=False,
            guided=lambda: same_halves(latents),
        )

    def modulated_input(self, block: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        x = argument(args, kwargs, 0, "hidden_states")
        return block.norm1(x, kwargs["timestep"], kwargs["class_labels"], hidden_dtype=x.dtype)[0]

    def modules(self, block: Any) -> Modules:
        if getattr(block, "_chunk_size", None) is not None:
            raise ValueError(
                "the mlp of this model runs in chunks of tokens, so its output never comes in one: undo "
                "set_chunk_feed_forward"
            )
        return Modules({"attn": block.attn1, "ff": block.ff})

    def output_layer(self, transformer: Any) -> nn.Module:
        return transformer.proj_out_2
