"""A denoiser of a few numbers, a pipeline around it as diffusers writes them, and every sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn


@dataclass
class ToyOutput(BaseOutput):
    """The model's own output class: a sample, and what else a model may give."""

    sample: Tensor
    further: list[Tensor] | None = None
    note: str = ""


class Toy(nn.Module):
    """A denoiser that counts its calls; its output bends gently with noise and latents."""

    def __init__(self, width: int = 4, further: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.text = nn.Linear(width, width), nn.Linear(3, width)
        self.calls: list[Tensor] = []
        self.further = further
        self.eval()

    @contextmanager
    def cache_context(self, name: str):
        yield

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        control: list[Tensor] | None = None,
        return_dict: bool = True,
    ) -> Any:
        self.calls.append(timestep)
        x = self.inner(sample).tanh() + timestep.float().reshape(-1, *[1] * (sample.ndim - 1)) / 2000
        if encoder_hidden_states is not None:
            x = x + self.text(encoder_hidden_states).mean(1, keepdim=True)
        if control is not None:
            x = x + control[0]
        if not return_dict:
            return (x,)
        return ToyOutput(x, [x * 2, x + 1] if self.further else None, "from the model")


class Loop:
    """A pipeline as diffusers writes them: sets timesteps, calls the model once or more a step, steps."""

    def __init__(self, model: Any, scheduler: Any) -> None:
        self.transformer, self.scheduler = model, scheduler
        self.outputs: list[Any] = []

    @torch.no_grad()
    def __call__(
        self,
        steps: int = 20,
        *,
        latents: Tensor | None = None,
        text: Tensor | None = None,
        branches: Sequence[str | None] = (None,),
        when: Callable[[int, str | None], bool] = lambda step, branch: True,
        callback: Callable[[Loop, int, dict], None] | None = None,
        controlnet_keep: list[float] | None = None,
        begin: int = 0,
        return_dict: bool = True,
        seed: int = 0,
    ) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # before 0.37 the stochastic flow sampler of diffusers asks for no other
        dynamic = {"mu": 1.0} if self.scheduler.config.get("use_dynamic_shifting") else {}
        self.scheduler.set_timesteps(steps, **dynamic)
        order = getattr(self.scheduler, "order", 1)
        timesteps = self.scheduler.timesteps[begin * order :]
        if begin and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin * order)
        self.outputs = []
        x = torch.randn(1, 6, 4, generator=g) if latents is None else latents
        texts = dict.fromkeys(branches, text)
        if text is not None and len(branches) > 1:
            texts[branches[1]] = text.flip(1).contiguous()
        for i, t in enumerate(timesteps):
            scaled = getattr(self.scheduler, "scale_model_input", lambda x, t: x)(x, t)
            control = None if controlnet_keep is None else [torch.ones(4) * controlnet_keep[i]]
            total = 0
            for branch in branches:
                if not when(i, branch):
                    continue
                with self.transformer.cache_context(branch or "none") if branch else _nothing():
                    out = self.transformer(
                        scaled,
                        t.expand(x.shape[0]),
                        encoder_hidden_states=texts[branch],
                        control=control,
                        return_dict=return_dict,
                    )
                self.outputs.append(out)
                total = total + (out.sample if return_dict else out[0])
            settings = {"generator": g} if "generator" in _parameters(self.scheduler) else {}
            x = self.scheduler.step(total, t, x, **settings).prev_sample
            if callback is not None:
                given = {"latents": x, "texts": texts}
                callback(self, i, given)
                x = given["latents"]
        return x


@contextmanager
def _nothing():
    yield


def _parameters(scheduler: Any) -> Sequence[str]:
    return scheduler.step.__code__.co_varnames


_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
_SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_ZERO_SNR = {
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
}

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "flow Euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow Euler dynamic": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    "flow Euler Karras": ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "flow Euler stochastic": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    "flow Heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    "flow LCM": ("FlowMatchLCMScheduler", {"shift": 3.0}),
    "flow UniPC": ("UniPCMultistepScheduler", _FLOW),
    "flow DPM++": ("DPMSolverMultistepScheduler", _FLOW),
    "flow DPM++ SDE": ("DPMSolverMultistepScheduler", _FLOW | {"algorithm_type": "sde-dpmsolver++"}),
    "flow DEIS": ("DEISMultistepScheduler", _FLOW),
    "UniPC": ("UniPCMultistepScheduler", _SD),
    "DPM++": ("DPMSolverMultistepScheduler", _SD),
    "DPM++ Karras": ("DPMSolverMultistepScheduler", _SD | {"use_karras_sigmas": True}),
    "DPM++ SDE": ("DPMSolverMultistepScheduler", _SD | {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ singlestep": ("DPMSolverSinglestepScheduler", _SD),
    "DEIS": ("DEISMultistepScheduler", _SD),
    "Euler": ("EulerDiscreteScheduler", _SD),
    "Euler zero SNR": ("EulerDiscreteScheduler", _SD | _ZERO_SNR),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", _SD),
    "Heun": ("HeunDiscreteScheduler", _SD),
    "KDPM2": ("KDPM2DiscreteScheduler", _SD),
    "KDPM2 ancestral": ("KDPM2AncestralDiscreteScheduler", _SD),
    "LMS": ("LMSDiscreteScheduler", _SD),
    "DDIM": ("DDIMScheduler", _SD),
    "DDIM zero SNR": ("DDIMScheduler", _SD | _ZERO_SNR),
    "DDPM": ("DDPMScheduler", _SD),
    "PNDM": ("PNDMScheduler", _SD | {"skip_prk_steps": True}),
    "LCM": ("LCMScheduler", _SD | {"original_inference_steps": 100}),
    "TCD": ("TCDScheduler", _SD | {"original_inference_steps": 100}),
    "EDM Euler": ("EDMEulerScheduler", {}),
    "EDM DPM++": ("EDMDPMSolverMultistepScheduler", {}),
    "CogVideoX DDIM": ("CogVideoXDDIMScheduler", _ZERO_SNR),
}
STOCHASTIC = [
    n for n in SAMPLERS if any(w in n for w in ("stochastic", "SDE", "ancestral", "LCM", "DDPM", "TCD"))
]


def sampler(name: str) -> Any:
    """A scheduler of diffusers."""
    kind, settings = SAMPLERS[name]
    return getattr(diffusers, kind)(**settings)
