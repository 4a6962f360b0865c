"""Families that draw pictures: FLUX.1, FLUX.2, Qwen-Image, HunyuanImage, DiT, SD3, Z-Image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers import FlowMatchEulerDiscreteScheduler as FlowMatch
from transformers import (
    ByT5Tokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from analysis.tiny_families import parts

Family = tuple[DiffusionPipeline, dict[str, Any]]
PROMPT = "a red sign"
GUIDED = {"negative_prompt": "blurred", "true_cfg_scale": 2.0}


class MissingFamily(ImportError):
    """The installed diffusers is too old for a family."""


def newer(name: str) -> type:
    """A class of diffusers that its oldest supported version has not."""
    if not hasattr(diffusers, name):
        raise MissingFamily(f"diffusers {diffusers.__version__} has no {name}: pip install -U diffusers")
    return getattr(diffusers, name)


def made(kind: str, call: dict[str, Any], **components: Any) -> Family:
    """The pipeline class `kind` of diffusers in evaluation mode, and the arguments of a small call."""
    pipeline = newer(kind)(**components)
    for part in components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, dict(call)


def vae(channels: int = 4, **settings: Any) -> AutoencoderKL:
    """A picture VAE that scales by 2."""
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 8],
        "norm_num_groups": 4,
        "sample_size": 32,
    }
    return AutoencoderKL(latent_channels=channels, **blocks, **settings)


def _flux_components(in_channels: int, out_channels: int | None = None) -> dict[str, Any]:
    parts.random_weights()
    return {
        "transformer": FluxTransformer2DModel(
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=3,
            num_single_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        "vae": vae(4, shift_factor=0.1, scaling_factor=0.4),
        "scheduler": FlowMatch(),
        "text_encoder": parts.clip(),
        "tokenizer": parts.tokenizer(77),
        "text_encoder_2": parts.t5(),
        "tokenizer_2": parts.tokenizer(64),
    }


SMALL = {"prompt": PROMPT, "height": 32, "width": 32, "max_sequence_length": 32}


def flux() -> Family:
    return made("FluxPipeline", SMALL, **_flux_components(16))


def flux_img2img() -> Family:
    call = SMALL | {"image": parts.picture(32), "strength": 0.7}
    return made("FluxImg2ImgPipeline", call, **_flux_components(16))


def flux_inpaint() -> Family:
    mask = parts.picture(32).convert("L").point(lambda v: 255 * (v > 128))
    call = SMALL | {"image": parts.picture(32), "mask_image": mask, "strength": 0.9}
    return made("FluxInpaintPipeline", call, **_flux_components(16))


def flux_fill() -> Family:
    """Fill: masked picture and mask come as further channels (16 + 16 + 16 of the mask's 2 x 2 x 4)."""
    mask = parts.picture(32).convert("L").point(lambda v: 255 * (v > 128))
    call = SMALL | {"image": parts.picture(32), "mask_image": mask}
    return made("FluxFillPipeline", call, **_flux_components(48, 16))


def flux_control() -> Family:
    call = SMALL | {"control_image": parts.picture(32)}
    return made("FluxControlPipeline", call, **_flux_components(32, 16))


def flux_kontext() -> Family:
    """Kontext: reference tokens after those of the picture, and two unnamed calls a step."""
    call = SMALL | GUIDED | {"image": parts.picture(32), "_auto_resize": False, "max_area": 32 * 32}
    return made("FluxKontextPipeline", call, **_flux_components(16))


def flux_controlnet() -> Family:
    components = _flux_components(16)
    config = dict(components["transformer"].config, num_layers=2, num_single_layers=2)
    controlnet = diffusers.FluxControlNetModel.from_config(config)
    for zero in [*controlnet.controlnet_blocks, *controlnet.controlnet_single_blocks]:
        torch.nn.init.normal_(zero.weight, std=0.02)
    call = SMALL | {"control_image": parts.picture(32)}
    return made("FluxControlNetPipeline", call, controlnet=controlnet, **components)


def flux_redux() -> Family:
    """Redux: another pipeline makes further text tokens of a picture; these stand for them."""
    g = torch.Generator().manual_seed(0)
    call = {k: v for k, v in SMALL.items() if k != "prompt"} | {
        "prompt_embeds": torch.randn(1, 40, 32, generator=g),
        "pooled_prompt_embeds": torch.randn(1, 32, generator=g),
    }
    return made("FluxPipeline", call, **_flux_components(16))


def _flux2_components(joint: int) -> dict[str, Any]:
    parts.random_weights()
    newer("Flux2KleinPipeline")  # with which guidance_embeds came
    return {
        "transformer": newer("Flux2Transformer2DModel")(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=5,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=joint,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=joint == 32,
        ),
        "vae": newer("AutoencoderKLFlux2")(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "scheduler": FlowMatch(),
    }


def flux2() -> Family:
    """FLUX.2 dev: embedded guidance, one call a step."""
    components = _flux2_components(joint=32)
    text = {"vocab_size": parts.VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    text |= {"num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 2}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = Mistral3Config(
        text_config=text | {"model_type": "mistral"},
        vision_config=vision | {"model_type": "pixtral", "image_size": 32, "patch_size": 8},
        image_token_index=5,
    )
    encoder = Mistral3ForConditionalGeneration(config)
    call = SMALL | {"text_encoder_out_layers": (1, 2)}
    return made("Flux2Pipeline", call, text_encoder=encoder, tokenizer=parts.tokenizer(), **components)


def _klein(kind: str, **call: Any) -> Family:
    components = _flux2_components(joint=48)
    encoder = Qwen3ForCausalLM(parts.qwen3_config(layers=28))  # of which Klein reads 9, 18 and 27
    return made(kind, SMALL | call, text_encoder=encoder, tokenizer=parts.tokenizer(), **components)


def flux2_klein() -> Family:
    """FLUX.2 Klein with a reference picture and guidance by two named calls."""
    return _klein("Flux2KleinPipeline", image=parts.picture(), guidance_scale=3.0)


def flux2_klein_kv() -> Family:
    """Klein KV: the first call has reference tokens, the others look up their keys and values."""
    return _klein("Flux2KleinKVPipeline", image=parts.picture())


def _qwen_components(levels: int) -> dict[str, Any]:
    """levels: how often the VAE halves a side."""
    parts.random_weights()
    return {
        "transformer": QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=6,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(8, 4, 4),
        ),
        "vae": AutoencoderKLQwenImage(
            base_dim=2,
            z_dim=4,
            dim_mult=[1] * (levels + 1),
            num_res_blocks=0,
            temperal_downsample=[False] * levels,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        "scheduler": FlowMatch(),
        "text_encoder": parts.qwen_vl(),
        "tokenizer": parts.tokenizer(),
    }


def qwen_image() -> Family:
    return made("QwenImagePipeline", SMALL | GUIDED, **_qwen_components(2))


def qwen_image_edit() -> Family:
    """Edit: the reference is brought to a megapixel, 64 tokens of this VAE, after the 4 of the picture."""
    call = SMALL | GUIDED | {"image": parts.picture(), "height": 256, "width": 256}
    return made("QwenImageEditPipeline", call, processor=parts.PictureProcessor(), **_qwen_components(6))


def qwen_image_edit_plus() -> Family:
    """Edit-plus: several references."""
    call = SMALL | GUIDED | {"image": [parts.picture(), parts.picture(48)], "height": 256, "width": 256}
    return made("QwenImageEditPlusPipeline", call, processor=parts.PictureProcessor(), **_qwen_components(6))


def hunyuan_image() -> Family:
    """HunyuanImage-2.1: a guider asks for two named calls a step."""
    parts.random_weights()
    components = {
        "transformer": newer("HunyuanImageTransformer2DModel")(
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
            num_single_layers=4,
            num_refiner_layers=1,
            patch_size=(1, 1),
            text_embed_dim=32,
            text_embed_2_dim=32,
            rope_axes_dim=(4, 4),
        ),
        "vae": newer("AutoencoderKLHunyuanImage")(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32, 32),
            layers_per_block=1,
            spatial_compression_ratio=4,
            sample_size=32,
            scaling_factor=0.5,
        ),
        "scheduler": FlowMatch(shift=7.0),
        "text_encoder": parts.qwen_vl(),
        "tokenizer": parts.tokenizer(2048),
        "text_encoder_2": parts.t5(384),
        "tokenizer_2": ByT5Tokenizer(),
        "guider": newer("AdaptiveProjectedMixGuidance")(adaptive_projected_guidance_start_step=1),
        "ocr_guider": newer("AdaptiveProjectedMixGuidance")(adaptive_projected_guidance_start_step=1),
    }
    pipeline, call = made("HunyuanImagePipeline", {"prompt": PROMPT, "height": 32, "width": 32}, **components)
    pipeline.tokenizer_max_length = 48  # it pads: 1000 tokens otherwise
    return pipeline, call


def dit() -> Family:
    """DiT: class to picture, [cond, uncond] in one batch."""
    parts.random_weights()
    components = {
        "transformer": DiTTransformer2DModel(
            sample_size=16,
            num_layers=6,
            patch_size=4,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
        ),
        "vae": vae(),
        "scheduler": DDIMScheduler(),
    }
    return made("DiTPipeline", {"class_labels": [1]}, **components)


def sd3() -> Family:
    """SD3: [uncond, cond] in one batch."""
    parts.random_weights()
    components = {
        "transformer": SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=6,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pooled_projection_dim=32,
        ),
        "vae": vae(shift_factor=0.1, scaling_factor=1.5),
        "scheduler": FlowMatch(),
        "text_encoder": parts.clip(16, projected=True),
        "tokenizer": parts.tokenizer(77),
        "text_encoder_2": parts.clip(16, projected=True),
        "tokenizer_2": parts.tokenizer(77),
        "text_encoder_3": parts.t5(),
        "tokenizer_3": parts.tokenizer(64),
    }
    return made("StableDiffusion3Pipeline", SMALL, **components)


def z_image() -> Family:
    """Z-Image: lists of samples, guidance by one batch, time rises."""
    parts.random_weights()
    transformer = newer("ZImageTransformer2DModel")(
        in_channels=4,
        dim=32,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.ones_(token)  # diffusers leaves them uninitialised
    components = {
        "transformer": transformer,
        "vae": vae(scaling_factor=0.4, shift_factor=0.1),
        "scheduler": FlowMatch(),
        "text_encoder": Qwen3Model(parts.qwen3_config()),
        "tokenizer": parts.tokenizer(),
    }
    return made("ZImagePipeline", SMALL | {"guidance_scale": 3.0}, **components)


PICTURES: dict[str, Callable[[], Family]] = {
    function.__name__: function
    for function in (
        flux,
        flux_img2img,
        flux_inpaint,
        flux_fill,
        flux_control,
        flux_kontext,
        flux_controlnet,
        flux_redux,
        flux2,
        flux2_klein,
        flux2_klein_kv,
        qwen_image,
        qwen_image_edit,
        qwen_image_edit_plus,
        hunyuan_image,
        dit,
        sd3,
        z_image,
    )
}
