"""The plan on whole pipelines of diffusers, those without an engine among them: tiny, of random weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
    PNDMScheduler,
    UNet2DConditionModel,
)

import h2cache
from analysis.tiny_families import FAMILIES, parts
from analysis.tiny_families.pictures import Family, made, vae
from h2cache import H2Config

NAMES = ("transformer", "transformer_2", "unet")
PROMPT = {"prompt": "a red sign", "height": 32, "width": 32}
SIZELESS = {"height": None, "width": None}  # these pipelines take the picture's
PICTURE, MASK = parts.picture(32), parts.picture(32).convert("L").point(lambda v: 255 * (v > 128))


def unet(channels: int = 4, **further: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        in_channels=channels,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        **further,
    )


def sd15(kind: str, scheduler: Any, channels: int = 4, **call: Any) -> Family:
    parts.random_weights()
    return made(
        kind,
        PROMPT | call,
        unet=unet(channels, cross_attention_dim=32),
        vae=vae(),
        scheduler=scheduler,
        text_encoder=parts.clip(),
        tokenizer=parts.tokenizer(77),
        safety_checker=None,
        feature_extractor=None,
    )


def sdxl(kind: str, scheduler: Any, **call: Any) -> Family:
    parts.random_weights()
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
    }
    return made(
        kind,
        PROMPT | call,
        unet=unet(cross_attention_dim=64, transformer_layers_per_block=1, **added),
        vae=vae(),
        scheduler=scheduler,
        text_encoder=parts.clip(),
        tokenizer=parts.tokenizer(77),
        text_encoder_2=parts.clip(projected=True),
        tokenizer_2=parts.tokenizer(77),
    )


def pixart() -> Family:
    parts.random_weights()
    transformer = PixArtTransformer2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
    )
    call = PROMPT | {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 24}
    return made(
        "PixArtSigmaPipeline",
        call,
        transformer=transformer,
        vae=vae(),
        scheduler=DPMSolverMultistepScheduler(),
        text_encoder=parts.t5(),
        tokenizer=parts.tokenizer(64),
    )


def ltx() -> Family:
    parts.random_weights()
    components = {
        "transformer": LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            patch_size=1,
            patch_size_t=1,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=1,
            caption_channels=32,
        ),
        "vae": AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False,) * 5,
            upsample_residual=(False,) * 4,
            upsample_factor=(1,) * 4,
            patch_size=1,
            patch_size_t=1,
            encoder_causal=True,
            decoder_causal=False,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "text_encoder": parts.t5(),
        "tokenizer": parts.tokenizer(64),
    }
    return made("LTXPipeline", PROMPT | {"num_frames": 9, "max_sequence_length": 24}, **components)


UNKNOWN: dict[str, Callable[[], Family]] = {
    "SD 1.5, PNDM": lambda: sd15("StableDiffusionPipeline", PNDMScheduler(skip_prk_steps=True)),
    "SD 1.5, DDIM": lambda: sd15("StableDiffusionPipeline", DDIMScheduler()),
    "SD 1.5, image to image": lambda: sd15(
        "StableDiffusionImg2ImgPipeline",
        DDIMScheduler(),
        image=PICTURE,
        strength=0.7,
        **SIZELESS,
    ),
    "SD 1.5, inpainting": lambda: sd15(
        "StableDiffusionInpaintPipeline", DDIMScheduler(), 9, image=PICTURE, mask_image=MASK
    ),
    "SDXL": lambda: sdxl("StableDiffusionXLPipeline", EulerDiscreteScheduler()),
    "SDXL, image to image": lambda: sdxl(
        "StableDiffusionXLImg2ImgPipeline",
        EulerDiscreteScheduler(),
        image=PICTURE,
        strength=0.7,
        **SIZELESS,
    ),
    "PixArt": pixart,
    "LTX": ltx,
}
KNOWN = ("flux_img2img", "wan", "wan22", "wan22_5b", "qwen_image", "hunyuan_video", "z_image", "sd3", "dit")
STEPS, COUNT = 9, 4


def run(pipeline: Any, call: dict[str, Any]) -> torch.Tensor:
    call = {k: v for k, v in call.items() if v is not None}
    output = pipeline(
        **call, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="np"
    )
    return torch.as_tensor(output[0])


def counted(pipeline: Any) -> dict[str, list[int]]:
    """How often each denoiser of `pipeline` runs, from now on."""
    calls: dict[str, list[int]] = {}
    for name in NAMES:
        if (model := getattr(pipeline, name, None)) is not None:
            calls[name] = [0]
            model.register_forward_pre_hook(lambda *_, of=calls[name]: of.__setitem__(0, of[0] + 1))
    return calls


@pytest.mark.parametrize("family", [*UNKNOWN, *KNOWN])
def test_a_whole_pipeline(family):
    pipeline, call = UNKNOWN[family]() if family in UNKNOWN else FAMILIES[family]()
    calls = counted(pipeline)
    right = run(pipeline, call)
    before = {name: dict(vars(getattr(pipeline, name))) for name in calls}
    full = {name: n[0] for name, n in calls.items()}
    h2cache.enable(pipeline, evaluations=STEPS + 1)
    assert torch.equal(run(pipeline, call), right)
    summary = h2cache.summary(pipeline)
    branches = len(summary.branches)
    assert sum(full.values()) == summary.steps * branches
    for n in calls.values():
        n[0] = 0
    h2cache.enable(pipeline, evaluations=COUNT)
    drawn = run(pipeline, call)
    assert torch.isfinite(drawn).all()
    assert sum(n[0] for n in calls.values()) == COUNT * branches
    assert all(n[0] >= branches for n in calls.values())
    summary = h2cache.summary(pipeline)
    assert len(summary.evaluated) == COUNT
    assert summary.bytes_of_all == 0
    assert 0 < summary.bytes_held <= summary.bytes_needed
    h2cache.disable(pipeline)
    if family in UNKNOWN:
        with pytest.raises(TypeError, match="no engine for"):
            h2cache.enable(pipeline, H2Config())
    assert {name: dict(vars(getattr(pipeline, name))) for name in calls} == before
    assert torch.equal(run(pipeline, call), right)


def test_wan_22_evaluates_each_transformer_where_it_begins():
    pipeline, call = FAMILIES["wan22"]()
    h2cache.enable(pipeline, evaluations=COUNT)
    run(pipeline, call)
    steps = h2cache.summary(pipeline).evaluated
    switch = int((pipeline.scheduler.timesteps >= 900).sum())
    assert 0 < switch < STEPS
    assert {0, switch} <= set(steps)
    assert len(steps) == COUNT


def test_a_flux_controlnet_that_ends_is_met_by_an_evaluation():
    pipeline, call = FAMILIES["flux_controlnet"]()
    calls = counted(pipeline)
    h2cache.enable(pipeline, evaluations=COUNT)
    run(pipeline, call | {"control_guidance_end": 0.5})
    assert calls["transformer"] == [COUNT]
    switch = next(n for n in range(STEPS) if (n + 1) / STEPS > 0.5)  # as the pipeline has it
    assert switch in h2cache.summary(pipeline).evaluated


def test_latents_that_a_callback_puts_in_are_evaluated_at_once():
    pipeline, call = FAMILIES["flux"]()

    def edit(pipe, step, t, given):
        return {"latents": given["latents"] * 1.5} if step == 3 else {}

    h2cache.enable(pipeline, h2cache.PlanConfig(steps=(0, 1, STEPS - 1)))
    run(pipeline, call | {"callback_on_step_end": edit})
    assert h2cache.summary(pipeline).evaluated == (0, 1, 4, STEPS - 1)
    run(pipeline, call | {"callback_on_step_end": lambda pipe, step, t, given: given})
    assert h2cache.summary(pipeline).evaluated == (0, 1, STEPS - 1)


def test_a_prompt_switched_by_a_callback():
    pipeline, call = FAMILIES["flux"]()
    other = pipeline.encode_prompt("zebra zebra", "zebra zebra", max_sequence_length=32)[0]

    def switch(pipe, step, t, given):
        return {"prompt_embeds": other} if step == 3 else {}

    further = {"callback_on_step_end": switch, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    h2cache.enable(pipeline, evaluations=COUNT)
    run(pipeline, call | further)
    assert h2cache.step_records(pipeline)[4].outcome == "miss"
    assert h2cache.summary(pipeline).steps == STEPS
