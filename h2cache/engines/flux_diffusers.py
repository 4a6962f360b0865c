"""FLUX.1 in diffusers: double-stream blocks are the structure stage, single-stream blocks the detail stage.

Facts (diffusers 0.35 to 0.42, models/transformers/transformer_flux.py): both kinds of block take
(hidden_states=img, encoder_hidden_states=txt, ...) and return (txt, img). ControlNet residuals are added to
img by the model's own loop after each block, so they pass through a cache untouched.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from h2cache.engines import Cut, Inputs, class_names
from h2cache.stages import Stream


def _argument(args: tuple, kwargs: dict[str, Any], position: int, name: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(name)


class FluxDiffusers:
    """Engine of `diffusers.FluxTransformer2DModel` and its subclasses."""

    name = "FluxTransformer2DModel (diffusers)"
    cuts = (
        Cut("structure", "transformer_blocks", joint=False),
        Cut("detail", "single_transformer_blocks", joint=True),
    )
    offers = frozenset({"modulated input"})

    def matches(self, transformer: nn.Module) -> bool:
        return "FluxTransformer2DModel" in class_names(transformer)

    def inputs(self, args: tuple, kwargs: dict[str, Any]) -> Inputs:
        controlled = (
            _argument(args, kwargs, 8, "controlnet_block_samples") is not None,
            _argument(args, kwargs, 9, "controlnet_single_block_samples") is not None,
        )
        attention = _argument(args, kwargs, 7, "joint_attention_kwargs") or {}
        return Inputs(
            timestep=_argument(args, kwargs, 3, "timestep"),
            latents=_argument(args, kwargs, 0, "hidden_states"),
            text=_argument(args, kwargs, 1, "encoder_hidden_states"),
            conditions=(
                *controlled,
                attention.get("scale"),  # of the LoRA
                *sorted(
                    attention.keys() - {"scale", "ip_hidden_states"}
                ),  # the model itself adds the last one
            ),
            adds_between=any(controlled),
        )

    def read_input(self, args: tuple, kwargs: dict[str, Any]) -> Stream:
        if args:  # gradient checkpointing calls by position
            return Stream(args[0], args[1])
        return Stream(kwargs["hidden_states"], kwargs["encoder_hidden_states"])

    def read_output(self, output: tuple) -> Stream:
        txt, img = output
        return Stream(img, txt)

    def write_output(self, stream: Stream) -> tuple:
        return stream.txt, stream.img

    def modulated_input(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        img, temb = _argument(args, kwargs, 0, "hidden_states"), _argument(args, kwargs, 2, "temb")
        return block.norm1(img, emb=temb)[0]

    def pass_through(self, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> tuple:
        return encoder_hidden_states, hidden_states
