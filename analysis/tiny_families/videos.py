"""Families that draw videos: HunyuanVideo, Wan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    HunyuanVideoTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers import FlowMatchEulerDiscreteScheduler as FlowMatch
from transformers import LlamaConfig, LlamaModel, UMT5Config, UMT5EncoderModel

from analysis.tiny_families import parts
from analysis.tiny_families.pictures import PROMPT, Family, made

SMALL = {"prompt": PROMPT, "height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 24}


def hunyuan_video() -> Family:
    """HunyuanVideo: embedded guidance, one call a step; padded text."""
    parts.random_weights()
    text = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=3,
        vocab_size=parts.VOCABULARY,
        pad_token_id=0,
    )
    components = {
        "transformer": HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=2,
            num_single_layers=4,
            num_refiner_layers=1,
            patch_size=1,
            patch_size_t=1,
            text_embed_dim=16,
            pooled_projection_dim=32,
            rope_axes_dim=(2, 4, 4),
        ),
        "vae": AutoencoderKLHunyuanVideo(
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(8,) * 4,
            layers_per_block=1,
            norm_num_groups=4,
            scaling_factor=0.5,
        ),
        "scheduler": FlowMatch(shift=7.0),
        "text_encoder": LlamaModel(text),
        "tokenizer": parts.tokenizer(),
        "text_encoder_2": parts.clip(),
        "tokenizer_2": parts.tokenizer(77),
    }
    call = SMALL | {"prompt_template": {"template": "{}", "crop_start": 0}}
    return made("HunyuanVideoPipeline", call, **components)


def _wan_components() -> dict[str, Any]:
    parts.random_weights()
    text = UMT5Config(
        d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, vocab_size=parts.VOCABULARY, pad_token_id=0
    )
    return {
        "vae": AutoencoderKLWan(
            base_dim=3,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
        "scheduler": FlowMatch(shift=7.0),
        "text_encoder": UMT5EncoderModel(text),
        "tokenizer": parts.tokenizer(512),
    }


def _embedded() -> dict[str, Any]:
    """A call with text states in place of the prompt: these two pipelines clean prompts with ftfy."""
    g = torch.Generator().manual_seed(0)
    states = {key: torch.randn(1, 24, 32, generator=g) for key in ("prompt_embeds", "negative_prompt_embeds")}
    return {key: value for key, value in SMALL.items() if key != "prompt"} | states


WIDTHS = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 32,
    "ffn_dim": 32,
    "num_layers": 6,
    "rope_max_seq_len": 32,
}


def wan() -> Family:
    """Wan 2.1: two named calls a step."""
    components = _wan_components()
    return made("WanPipeline", SMALL, transformer=WanTransformer3DModel(**WIDTHS), **components)


def wan22() -> Family:
    """Wan 2.2 14B: a second transformer below the boundary."""
    components = _wan_components()
    both = {name: WanTransformer3DModel(**WIDTHS) for name in ("transformer", "transformer_2")}
    return made("WanPipeline", SMALL, boundary_ratio=0.9, **both, **components)


def wan22_5b() -> Family:
    """Wan 2.2 5B from a picture: one timestep a token, 0 for those of the given first frame."""
    components = _wan_components()
    transformer = WanTransformer3DModel(**WIDTHS)
    call = _embedded() | {"image": parts.picture(32)}
    return made(
        "WanImageToVideoPipeline",
        call,
        transformer=transformer,
        image_encoder=None,
        image_processor=None,
        expand_timesteps=True,
        **components,
    )


def wan_vace() -> Family:
    """VACE: hints after chosen blocks."""
    components = _wan_components()
    transformer = WanVACETransformer3DModel(**WIDTHS, vace_layers=[0, 3], vace_in_channels=96)
    call = _embedded() | {"video": [parts.picture(32)] * 5}
    return made("WanVACEPipeline", call, transformer=transformer, **components)


VIDEOS: dict[str, Callable[[], Family]] = {
    function.__name__: function for function in (hunyuan_video, wan, wan22, wan22_5b, wan_vace)
}
