"""Wan 2.1, Wan 2.2 and VACE in diffusers: one list of blocks, the first third is the structure stage.

Facts (diffusers 0.42, models/transformers/transformer_wan.py and transformer_wan_vace.py): blocks take
(x, text, timestep_proj, rotary) and return x; the text comes in by cross-attention and stays constant. VACE
adds its hints after chosen blocks in the model's own loop, so they are fresh at every step; its own blocks
run before the list and are not cached. Wan 2.2 14B has two transformers, the second below a boundary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from h2cache.engines.base import Engine, Inputs, one_stack
from h2cache.engines.forms import OneStream, argument


class WanDiffusers(Engine):
    """Engine of `diffusers.WanTransformer3DModel` and `diffusers.WanVACETransformer3DModel`."""

    name = "WanTransformer3DModel, WanVACETransformer3DModel (diffusers)"
    serves = ("WanTransformer3DModel", "WanVACETransformer3DModel")
    cuts = one_stack("blocks", OneStream())
    offers = frozenset({"modulated input"})

    def inputs(self, args: tuple, kwargs: dict[str, Any]) -> Inputs:
        timestep = argument(args, kwargs, 1, "timestep")
        return Inputs(
            timestep=timestep.reshape(-1)[-1:],  # one a token in 5B; those of a given first frame stay at 0
            latents=argument(args, kwargs, 0, "hidden_states"),  # (B, C, F, H, W)
            text=argument(args, kwargs, 2, "encoder_hidden_states"),
            conditions=((kwargs.get("attention_kwargs") or {}).get("scale"),),
            adds_between=kwargs.get("control_hidden_states") is not None,
            modulated_tokens=6 * (timestep.shape[1] if timestep.ndim == 2 else 1),
        )

    def modulated_input(self, block: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Not the tokens but the projected time embedding, (B, 6, C), as TeaCache's authors do here."""
        embedding = argument(args, kwargs, 2, "temb")
        return embedding.flatten(1, 2) if embedding.ndim == 4 else embedding  # 5B: (B, I * 6, C)

    def starts(self, pipeline: Any, steps: int, begun: int) -> tuple[int, ...]:
        ratio = pipeline.config.get("boundary_ratio")
        if ratio is None or getattr(pipeline, "transformer_2", None) is None or pipeline.transformer is None:
            return (0,)
        boundary = ratio * pipeline.scheduler.config.num_train_timesteps
        own = pipeline.scheduler.timesteps[begun : begun + steps]
        high = int((own >= boundary).sum())  # a wait, once a request
        return (0, high) if 0 < high < steps else (0,)
