"""Other samplers for a pipeline, by a short name: diffusers' own, set as the one it came with."""

from __future__ import annotations

import math
from typing import Any

from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}  # of those that serve noise models too


class FlowMatchHeun(FlowMatchHeunDiscreteScheduler):
    """diffusers' Heun, for FLUX's pipelines too: they give sigmas, which are not used, and a shift."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """`num_inference_steps`, else as many as `sigmas`; 2 N - 1 evaluations."""
        if mu is not None:
            self.register_to_config(shift=math.exp(mu))
        super().set_timesteps(len(sigmas) if num_inference_steps is None else num_inference_steps, device)


OF_FLOWS = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeun,
    "unipc": UniPCMultistepScheduler,
    "dpm++": DPMSolverMultistepScheduler,
}
OF_NOISE = {"ddim": DDIMScheduler, "unipc": UniPCMultistepScheduler, "dpm++": DPMSolverMultistepScheduler}
SAMPLERS = sorted({*OF_FLOWS, *OF_NOISE})


def is_flow(scheduler: Any) -> bool:
    """Whether the model of this scheduler predicts a flow, not noise."""
    return "FlowMatch" in type(scheduler).__name__ or bool(scheduler.config.get("use_flow_sigmas"))


def other_sampler(pipeline: DiffusionPipeline, name: str) -> Any:
    """A new scheduler for `pipeline`; ValueError where its model has none of this name."""
    own = pipeline.scheduler
    flow = is_flow(own)
    kinds = OF_FLOWS if flow else OF_NOISE
    if name not in kinds:
        raise ValueError(
            f"--sampler {name}: the model of {type(own).__name__} predicts {'a flow' if flow else 'noise'}: "
            f"choose from {', '.join(sorted(kinds))}"
        )
    shift = own.config.get("flow_shift", own.config.get("shift", 1.0))
    further = {"shift": shift, "flow_shift": shift} if flow else {}
    return kinds[name].from_config(own.config, **further, **(FLOW if flow else {}))
