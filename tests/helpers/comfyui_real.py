"""ComfyUI itself as the tests see it, from the checkout that COMFYUI_PATH names: tiny models, on the CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 8,
    "context_in_dim": 12,
    "hidden_size": 32,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 3,
    "depth_single_blocks": 4,
    "axes_dim": [4, 6, 6],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
}
WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 24,
    "ffn_dim": 32,
    "num_heads": 2,
    "num_layers": 2,
}
WAN |= {"in_dim": 16, "out_dim": 16, "text_dim": 12, "freq_dim": 16, "patch_size": (1, 2, 2), "qk_norm": True}


def load() -> Any:
    """ComfyUI's modules, as its own main.py would set them up."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    arguments, sys.argv = sys.argv, ["main.py", "--cpu"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.controlnet
        import comfy.model_management
        import comfy.model_patcher
        import comfy.samplers
        import comfy.supported_models
    finally:
        sys.argv = arguments
    return comfy


def flux_config(comfy: Any, facts: dict[str, Any]) -> Any:
    """A small FLUX, with `facts` in the place of our own."""
    from comfy.ldm.flux.model import FluxParams

    later = {"txt_ids_dims": []}  # since FLUX.2
    known = {name: value for name, value in later.items() if name in FluxParams.__annotations__}
    return comfy.supported_models.Flux(FLUX | known | facts)


def patcher_of(comfy: Any, config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A model of weights that have no values yet."""
    config.unet_config["dtype"] = dtype
    config.set_inference_dtype(dtype, None)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(config.get_model({}).eval(), cpu, cpu)


class Real:
    """The same as `Double`, by ComfyUI."""

    name = "ComfyUI"
    samplers = (
        "euler",
        "heun",
        "euler_ancestral",
        "dpmpp_2m",
        "res_multistep",
        "dpmpp_sde",
        "uni_pc",
        "dpm_2",
    )

    def __init__(self) -> None:
        self.comfy = load()

    def flux(self, seed: int = 0, half: bool = False, tidy: bool = False, looks: bool = False) -> Any:
        config = flux_config(self.comfy, {})
        return self._random(config, seed, torch.float16 if half else torch.float32)

    def other(self) -> Any:
        return self._random(self.comfy.supported_models.WAN21_T2V(dict(WAN)), 0)

    def _random(self, config: Any, seed: int, dtype: torch.dtype = torch.float32) -> Any:
        torch.manual_seed(seed)
        patcher = patcher_of(self.comfy, config, dtype)
        for parameter in patcher.model.diffusion_model.parameters():
            parameter.data = (torch.randn_like(parameter.float()) * 0.1).to(dtype)
        return patcher

    def diffusion_model(self, patcher: Any) -> nn.Module:
        return patcher.model.diffusion_model

    def sample(
        self,
        patcher: Any,
        steps: int = 8,
        seed: int = 0,
        size: tuple[int, int] = (8, 8),
        batch: int = 1,
        sampler: str = "euler",
        cfg: float = 1.0,
        splits: Callable[[int], bool] = lambda evaluation: False,
        controlled: Callable[[float], bool] | None = None,
        references: int = 0,
        callback: Callable[[dict], None] | None = None,
    ) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        video = "Wan" in type(self.diffusion_model(patcher)).__name__
        noise = torch.randn(batch, 16, *((1,) if video else ()), *size, generator=g)
        kept: dict[str, Any] = {}
        if controlled is not None:
            kept["control"] = _control(self.comfy)(controlled)
        if references:
            kept["reference_latents"] = [torch.ones(1, 16, 4, 4) * 0.3] * references
        texts = [torch.randn(1, 6, 12, generator=torch.Generator().manual_seed(n)) for n in (7, 8)]
        positive, negative = ([[text, {"pooled_output": torch.zeros(1, 8), **kept}]] for text in texts)
        management, evaluations = self.comfy.model_management, [0]
        known = management.get_free_memory
        guider = self.comfy.samplers.CFGGuider(patcher.clone())
        guider.model_patcher.add_wrapper_with_key("predict_noise", "counted", _counted(evaluations))
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        sampling = self.comfy.samplers.KSampler(patcher, steps, torch.device("cpu"), sampler, "simple")

        def free(device: Any = None, *further: Any) -> Any:  # without `further` it asks how much to batch
            short = evaluations[0] > 0 and not further and splits(evaluations[0] - 1)
            return 0 if short else known(device, *further)

        def told(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
            if callback is not None:
                callback({"i": step, "denoised": denoised, "x": x})

        management.get_free_memory = free  # as on a card whose memory runs short in mid-run
        try:
            method, empty = self.comfy.samplers.sampler_object(sampler), torch.zeros_like(noise)
            return guider.sample(noise, empty, method, sampling.sigmas, None, told, True, seed)
        finally:
            management.get_free_memory = known

    def with_lora(self, patcher: Any, name: str) -> Any:
        clone = patcher.clone()
        change = torch.full_like(clone.get_model_object(name), 0.05)
        assert clone.add_patches({name: ("diff", (change,))})
        return clone

    def switch_compile(self, patcher: Any) -> None:
        patcher.add_wrapper_with_key("apply_model", "torch.compile", lambda run, *a, **k: run(*a, **k))


def _counted(evaluations: list[int]) -> Callable:
    def count(executor: Any, *args: Any, **kwargs: Any) -> Any:
        evaluations[0] += 1
        return executor(*args, **kwargs)

    return count


def _control(comfy: Any) -> type:
    class Control(comfy.controlnet.ControlBase):
        """Adds the same to a model's blocks at each step at which `acts(sigma)` says so."""

        def __init__(self, acts: Callable[[float], bool]) -> None:
            super().__init__()
            self.acts = acts

        def get_control(self, x: Tensor, t: Tensor, *args: Any) -> Any:
            if not self.acts(float(t[0])):
                return None
            g = torch.Generator().manual_seed(3)
            added = [torch.randn(1, 16, 32, generator=g).expand(len(x), -1, -1) for _ in range(3)]
            return {"input": [added[0], added[1]], "output": [None, added[2]]}

        def get_models(self) -> list:
            return []

    return Control


class Embedded:
    """The FLUX of a small diffusers pipeline, moved into ComfyUI with its own weights."""

    def __init__(self, comfy: Any, pipeline: Any) -> None:
        import comfy.model_detection

        self.comfy, self.pipeline = comfy, pipeline
        given = pipeline.transformer.config
        facts = {
            "in_channels": given.in_channels // 4,
            "out_channels": given.in_channels // 4,
            "vec_in_dim": given.pooled_projection_dim,
            "context_in_dim": given.joint_attention_dim,
            "hidden_size": given.attention_head_dim * given.num_attention_heads,
            "mlp_ratio": 4.0,
            "num_heads": given.num_attention_heads,
            "depth": given.num_layers,
            "depth_single_blocks": given.num_single_layers,
            "axes_dim": [*given.axes_dims_rope],
        }
        self.patcher = patcher_of(comfy, flux_config(comfy, facts))
        weights = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
        converted = comfy.model_detection.convert_diffusers_mmdit(weights, "")
        self.patcher.model.diffusion_model.load_state_dict(converted)

    @torch.no_grad()
    def draw(self, patcher: Any, prompt: str, steps: int, seed: int = 0) -> Tensor:
        """Packed latents, as diffusers draws them at 128x128."""
        text, pooled, _ = self.pipeline.encode_prompt(prompt, prompt, max_sequence_length=24)
        guider = self.comfy.samplers.CFGGuider(patcher)
        cond = [[text, {"pooled_output": pooled, "guidance": 3.5}]]
        guider.set_conds(cond, cond)
        guider.set_cfg(1.0)
        noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(seed))
        sigmas = self.pipeline.scheduler.sigmas.clone()  # those of its last call
        assert len(sigmas) == steps + 1
        method, empty = self.comfy.samplers.sampler_object("euler"), torch.zeros_like(noise)
        drawn = guider.sample(noise, empty, method, sigmas, disable_pbar=True, seed=seed)
        return self.pipeline._pack_latents(patcher.model.process_latent_in(drawn), 1, 16, 16, 16)
