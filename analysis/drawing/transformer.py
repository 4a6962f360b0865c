"""A transformer without the rest of its pipeline, and inputs of the right shapes."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from analysis.drawing.draw import DTYPE
from analysis.drawing.load import check_loading, load_quantized
from h2cache.room import free_bytes

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_transformer(args: argparse.Namespace) -> torch.nn.Module:
    """The transformer that `args` ask for, without the rest of its pipeline."""
    if check_loading(args, args.device) == "nunchaku":
        return load_quantized(args, args.device, v1=args.v1)[0]
    if args.v1 or args.lora or args.offload:
        raise ValueError("--v1, --lora and --offload are measured with --engine nunchaku only")
    dtype = args.dtype or ("float32" if torch.device(args.device).type == "cpu" else "bfloat16")
    if not Path(args.model).expanduser().exists() and not HUB_ID.fullmatch(args.model):
        raise FileNotFoundError(
            f"no model folder {args.model!r}, and it has not the form owner/name of a hub id"
        )
    model = FluxTransformer2DModel.from_pretrained(
        args.model, subfolder="transformer", use_safetensors=True, **{DTYPE: getattr(torch, dtype)}
    )
    return model.to(args.device).eval()


def random_inputs(
    config, tokens: int, text: int, device: str, dtype: torch.dtype, batch: int = 1, seed: int = 0
) -> dict:
    """Arguments of one forward call of a FLUX transformer with this `config`, for different square images."""
    kw, side = {"device": device}, int(tokens**0.5)
    ids = torch.zeros(tokens, 3, **kw)
    ids[:, 1], ids[:, 2] = torch.arange(tokens, **kw) // side, torch.arange(tokens, **kw) % side
    generator = torch.Generator("cpu").manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator).to(device, dtype)

    return {
        "hidden_states": noise(tokens, config.in_channels),
        "encoder_hidden_states": noise(text, config.joint_attention_dim),
        "pooled_projections": noise(config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5, **kw),
        "guidance": torch.full((batch,), 3.5, **kw) if config.guidance_embeds else None,
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3, **kw),
        "return_dict": False,
    }


def random_flux(
    double: int, single: int, device: str, dtype: torch.dtype, **shape: Any
) -> FluxTransformer2DModel:
    """FLUX.1-dev's transformer with so many blocks and random weights, built on `device` itself.

    shape: what else differs from FLUX.1-dev, as the model names it.
    """
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = FluxTransformer2DModel(
                num_layers=double, num_single_layers=single, guidance_embeds=True, **shape
            )
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def sized_flux(
    width: int, heads: int, double: int, single: int, tokens: int, device: str, dtype: torch.dtype
) -> FluxTransformer2DModel:
    """FLUX.1-dev's transformer with these dimensions and random weights; MemoryError where it has no room.

    tokens: of image and text together, for what its blocks compute.
    """
    numbers = (36 * double + 15 * single) * width**2 + tokens * width * 12
    needed, free = numbers * dtype.itemsize, free_bytes(torch.device(device))
    if needed > free:
        raise MemoryError(
            f"--width {width}: the model takes {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB "
            "are free: lower --width, --double, --single or --tokens"
        )
    head = width // heads
    side = head * 7 // 32 * 2  # FLUX.1-dev: (16, 56, 56) of 128
    axes = (head - 2 * side, side, side)
    shape = {"attention_head_dim": head, "num_attention_heads": heads, "axes_dims_rope": axes}
    return random_flux(double, single, device, dtype, **shape)


def only_heads(model: FluxTransformer2DModel, single: int = 1) -> FluxTransformer2DModel:
    """The same weights with the first block of each stage only; single: 0 leaves the second one out."""
    config = dict(model.config, num_layers=1, num_single_layers=single)
    with torch.device("meta"):
        heads = FluxTransformer2DModel.from_config(config)
    state = {k: v for k, v in model.state_dict().items() if k in heads.state_dict()}
    heads.load_state_dict(state, assign=True)
    return heads.eval()
