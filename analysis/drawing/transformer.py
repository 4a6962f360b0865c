"""A transformer without the rest of its pipeline, and inputs of the right shapes."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

from analysis.cli import TINY
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


def random_inputs(config, tokens: int, text: int, device: str, dtype: torch.dtype) -> dict:
    """Arguments of one forward call of a FLUX transformer with this `config`, for a square image."""
    kw, side = {"device": device}, int(tokens**0.5)
    ids = torch.zeros(tokens, 3, **kw)
    ids[:, 1], ids[:, 2] = torch.arange(tokens, **kw) // side, torch.arange(tokens, **kw) % side
    generator = torch.Generator("cpu").manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator).to(device, dtype)

    return {
        "hidden_states": noise(tokens, config.in_channels),
        "encoder_hidden_states": noise(text, config.joint_attention_dim),
        "pooled_projections": noise(config.pooled_projection_dim),
        "timestep": torch.full((1,), 0.5, **kw),
        "guidance": torch.full((1,), 3.5, **kw) if config.guidance_embeds else None,
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3, **kw),
        "return_dict": False,
    }


def build(args: argparse.Namespace) -> FluxTransformer2DModel:
    """The embedded transformer, or one of random weights with the dimensions asked for."""
    if args.width is None:
        model = FluxTransformer2DModel.from_pretrained(TINY, subfolder="transformer", use_safetensors=True)
    else:
        numbers = (36 * args.double + 15 * args.single) * args.width**2  # weights of the blocks
        numbers += (args.tokens + args.text) * args.width * 12  # and what a block computes
        needed, free = numbers * getattr(torch, args.dtype).itemsize, free_bytes(torch.device(args.device))
        if needed > free:
            raise MemoryError(
                f"--width {args.width}: the model takes {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB "
                "are free: lower --width, --double, --single or --tokens"
            )
        with torch.device(args.device):
            torch.set_default_dtype(getattr(torch, args.dtype))
            head = args.width // args.heads
            side = head * 7 // 32 * 2  # FLUX.1-dev: (16, 56, 56) of 128
            model = FluxTransformer2DModel(
                num_layers=args.double,
                num_single_layers=args.single,
                attention_head_dim=head,
                num_attention_heads=args.heads,
                guidance_embeds=True,
                axes_dims_rope=(head - 2 * side, side, side),
            )
            torch.set_default_dtype(torch.float32)
    return model.to(args.device, getattr(torch, args.dtype)).eval()


def only_heads(model: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """The same weights without all blocks but the first of each stage."""
    config = dict(model.config, num_layers=1, num_single_layers=1)
    with torch.device("meta"):
        heads = FluxTransformer2DModel.from_config(config)
    state = {k: v for k, v in model.state_dict().items() if k in heads.state_dict()}
    heads.load_state_dict(state, assign=True)
    return heads.eval()
