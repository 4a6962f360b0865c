"""What a cache must know of ComfyUI's models: the arguments of `apply_model`, and FLUX's two block lists.

Facts (ComfyUI 0.3.64 and 0.8.0, comfy/model_base.py, comfy/ldm/flux/model.py): every model is called by
apply_model(x, sigma, c_concat, c_crossattn, control, transformer_options, **conditions). FLUX's double blocks
take img= and txt= and return (img, txt); its single blocks take one tensor, text first. **Blocks write into
their inputs**, and the model adds ControlNet in place to what a block returned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from h2cache.engines.base import Cut, Engine, Inputs
from h2cache.engines.forms import Joined, argument
from h2cache.program import Stream

DOUBLE, SINGLE = "double_blocks", "single_blocks"


class AnyModel(Engine):
    """Engine of whatever ComfyUI samples: it offers the call of the whole."""

    name = "a model of ComfyUI"
    serves: tuple[str, ...] = ()
    cuts: tuple[Cut, ...] = ()
    offers = frozenset({"whole"})

    def inputs(self, args: tuple, kwargs: dict[str, Any]) -> Inputs:
        """Of `apply_model`."""
        control, options = argument(args, kwargs, 4, "control"), options_of(args, kwargs)
        replaced = sorted(map(str, options.get("patches_replace", {}).get("dit", {})))
        return Inputs(
            timestep=argument(args, kwargs, 1, "t"),
            latents=argument(args, kwargs, 0, "x"),
            text=argument(args, kwargs, 3, "c_crossattn"),
            conditions=(control is not None, *replaced),
            adds_between=control is not None or bool(replaced) or bool(options.get("patches")),
        )


class Flux(AnyModel):
    """Engine of `comfy.ldm.flux.model.Flux`; one for each model, which knows the size of its patches."""

    name = "Flux (ComfyUI)"
    serves = ("Flux",)
    offers = frozenset()

    def __init__(self, patch: int) -> None:
        self.patch = patch
        self.cuts = (
            Cut("structure", DOUBLE, DoubleBlocks()),
            Cut("detail", SINGLE, SingleBlocks(), joint=True),
        )

    def inputs(self, args: tuple, kwargs: dict[str, Any]) -> Inputs:
        inputs = super().inputs(args, kwargs)
        if kwargs.get("ref_latents"):  # Kontext and FLUX.2 append the tokens of other pictures
            height, width = ((n + self.patch // 2) // self.patch for n in inputs.latents.shape[-2:])
            inputs.targets = lambda: slice(height * width)
        return inputs


def options_of(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The `transformer_options` of a call of `apply_model`."""
    return argument(args, kwargs, 5, "transformer_options") or {}


@dataclass(frozen=True)
class DoubleBlocks:
    """Blocks that take img= and txt= and return both."""

    joined = False

    def read_input(self, args: tuple, kwargs: dict[str, Any], text_tokens: int = 0) -> Stream:
        return Stream(argument(args, kwargs, 0, "img"), argument(args, kwargs, 1, "txt"))

    def read_output(self, output: tuple, text_tokens: int = 0) -> Stream:
        return Stream(*output)

    def write_output(self, stream: Stream) -> tuple:
        return stream.img, stream.txt

    def pass_through(self, *args: Any, **kwargs: Any) -> tuple:
        return self.write_output(self.read_input(args, kwargs))

    def copied(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The same arguments with tensors that the block may write into."""
        given = [part.clone() if n < 2 else part for n, part in enumerate(args)]
        named = {name: kwargs[name].clone() for name in ("img", "txt") if name in kwargs}
        return tuple(given), kwargs | named


@dataclass(frozen=True)
class SingleBlocks(Joined):
    """Blocks that take and return one tensor, whatever its name."""

    def read_input(self, args: tuple, kwargs: dict[str, Any], text_tokens: int) -> Stream:
        return self.read_output(self.pass_through(*args, **kwargs), text_tokens)

    def pass_through(self, *args: Any, **kwargs: Any) -> Tensor:
        return args[0] if args else kwargs["x"]

    def copied(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The same arguments with a tensor that the block may write into."""
        if args:
            return (args[0].clone(), *args[1:]), kwargs
        return (), kwargs | {"x": kwargs["x"].clone()}


def clamped(tensor: Tensor) -> Tensor:
    """As FLUX's blocks have it: in float16 nothing is infinite."""
    if tensor.dtype != torch.float16:
        return tensor
    return torch.nan_to_num(tensor, nan=0.0, posinf=65504, neginf=-65504)
