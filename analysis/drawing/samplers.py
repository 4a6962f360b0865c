"""Other samplers for a pipeline, by a short name: diffusers' own, set as the one it came with."""

from __future__ import annotations

import inspect
import math
from typing import Any

import diffusers
import numpy as np
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
)

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}  # of those that serve noise models too


def _shift_of(scheduler: SchedulerMixin, mu: float | None) -> float | None:
    """The shift of the noise levels that a pipeline asks for; None: the configured one is meant.

    Pipelines of FLUX and Z-Image always give mu; a model of a fixed shift does not take it.
    """
    if mu is None or not scheduler.config.get("use_dynamic_shifting"):
        return None
    return mu if scheduler.config.get("time_shift_type") == "linear" else math.exp(mu)


class _Shifted:
    """`set_timesteps` for pipelines that give sigmas, which are not used, or a shift by size."""

    shift_field = "shift"  # of the configuration

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """`num_inference_steps`, else as many as `sigmas`."""
        if (shift := _shift_of(self, mu)) is not None:
            self.register_to_config(**{self.shift_field: shift})
        super().set_timesteps(len(sigmas) if num_inference_steps is None else num_inference_steps, device)


class FlowMatchHeun(_Shifted, FlowMatchHeunDiscreteScheduler):
    """diffusers' Heun; 2 N - 1 evaluations."""


class DPMSolverMultistepScheduler(_Shifted, diffusers.DPMSolverMultistepScheduler):
    """diffusers' DPM++."""

    shift_field = "flow_shift"


class UniPCMultistepScheduler(diffusers.UniPCMultistepScheduler):
    """diffusers', for pipelines that give sigmas in a list, which it cannot shift."""

    def set_timesteps(self, *args: Any, sigmas: Any = None, mu: float | None = None, **further: Any) -> None:
        """As diffusers'; pipelines look for `sigmas` and `mu` by name."""
        sigmas = None if sigmas is None else np.asarray(sigmas, dtype=np.float64)
        super().set_timesteps(*args, sigmas=sigmas, mu=mu, **further)


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
    """A new scheduler for `pipeline`; ValueError where its model has none of this name.

    Image-to-image of a flow takes Euler's only: it asks the scheduler for the noisy picture, which the others
    do not give, and FLUX's counts the steps of Heun twice, so that too few of them are left.
    """
    own = pipeline.scheduler
    if not isinstance(own, SchedulerMixin):
        raise ValueError(f"--sampler {name}: {type(pipeline).__name__} has one of its own only")
    flow = is_flow(own)
    kinds = OF_FLOWS if flow else OF_NOISE
    if name not in kinds:
        raise ValueError(
            f"--sampler {name}: the model of {type(own).__name__} predicts {'a flow' if flow else 'noise'}: "
            f"choose from {', '.join(sorted(kinds))}"
        )
    if flow and name != "euler" and "strength" in inspect.signature(pipeline.__call__).parameters:
        raise ValueError(
            f"--sampler {name}: {type(pipeline).__name__} begins in the middle of the steps, which it does "
            "with the Euler sampler only: leave --sampler or --input-image out"
        )
    shift = own.config.get("flow_shift", own.config.get("shift", 1.0))
    further = {"shift": shift, "flow_shift": shift} if flow else {}
    return kinds[name].from_config(own.config, **further, **(FLOW if flow else {}))
