"""The steps of one request, as its scheduler laid them out: noise levels, and which step is at hand."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

_LEAST_ALPHA = 2.0**-24  # as diffusers has it where the last step is pure noise
_LEAST_NOISE = 1e-2
_STOCHASTIC = ("Ancestral", "LCM", "DDPM", "SDE", "TCD", "SASolver", "CogVideoXDPM", "Stochastic")
_NEAR = 0.004  # of the largest timestep: what rounding to bfloat16 may move one by
TRAINED = 1000.0  # timesteps of a scheduler at noise level 1
DENOISERS = ("transformer", "transformer_2", "unet")  # attributes of a pipeline


def calling_pipeline(denoiser: nn.Module) -> Any:
    """The pipeline whose call runs `denoiser` right now, found on the stack; None: somebody's own loop.

    Several pipelines may share a denoiser, each with a scheduler of its own, and the one that was enabled
    need not be the one that runs.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        names = frame.f_code.co_varnames + frame.f_code.co_freevars
        for name in ("self", "components"):  # the latter in diffusers' modular pipelines
            if name not in names:
                continue
            owner = frame.f_locals.get(name)
            if isinstance(owner, nn.Module) or not hasattr(owner, "scheduler"):
                continue
            parts = [getattr(owner, part, None) for part in DENOISERS]
            if any(part is denoiser or getattr(part, "_orig_mod", None) is denoiser for part in parts):
                return owner
        frame = frame.f_back
    return None


def local_of(pipeline: Any, name: str) -> Any:
    """The local variable `name` of the call of `pipeline` that is under way; None: it has none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if name in frame.f_code.co_varnames and frame.f_locals.get("self") is pipeline:
            return frame.f_locals.get(name)
        frame = frame.f_back
    return None


def was_edited(pipeline: Any) -> bool:
    """Whether the callback of the call under way has put other latents in the place of the sampler's.

    Seen where it returns them in a dictionary of its own; one that edits what it was given leaves no trace.
    """
    given = local_of(pipeline, "callback_kwargs")
    return bool(given) and "latents" in given and given["latents"] is not local_of(pipeline, "latents")


@dataclass(frozen=True)
class Course:
    """The noise levels of one pipeline call, known before its first step."""

    levels: tuple[float, ...]  # at each step and after the last, falling within [0, 1]: sigma of a flow
    lengths: tuple[float, ...]  # what a step's output weighs in the final sample, up to a common factor
    starts: tuple[int, ...]  # steps at which the history starts empty: 0, and those where another denoiser
    # begins or a ControlNet is switched on or off
    sampler: str = ""  # class of the scheduler
    stochastic: bool = False  # it draws fresh noise at its steps
    flow: bool = True  # the model predicts a flow's velocity
    multistep: bool = False  # the sampler looks back at outputs itself (UniPC, DPM++)

    @property
    def steps(self) -> int:
        return len(self.lengths)

    @property
    def adds_up(self) -> bool:
        """Whether outputs add up over the noise level itself, at one evaluation a step: flow samplers."""
        return all(
            math.isclose(b - a, d, abs_tol=1e-9)
            for (a, b), d in zip(pairwise(self.levels), self.lengths, strict=True)
        )


def _kind(scheduler: Any) -> str:
    """The class of a scheduler; of a class that was made from one of diffusers, that one."""
    kinds = (kind for kind in type(scheduler).__mro__ if kind.__module__.startswith("diffusers.schedulers."))
    known = (kind.__name__ for kind in kinds if kind.__name__ != "SchedulerMixin")
    return next(known, type(scheduler).__name__)


class Schedule:
    """The timesteps of a scheduler after its `set_timesteps`, and where in them a request is."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        # `set_timesteps` makes a new tensor at each call; it is held, so that its address is not used again.
        self.token: Tensor = scheduler.timesteps

    @classmethod
    def of(cls, pipeline: Any) -> Schedule | None:
        """That of a pipeline, if it has a scheduler and its steps are set."""
        scheduler = getattr(pipeline, "scheduler", None)
        return cls(scheduler) if isinstance(getattr(scheduler, "timesteps", None), Tensor) else None

    @cached_property
    def timesteps(self) -> list[float]:
        """As the scheduler has them, falling; a wait, once a request."""
        return self.token.detach().flatten().tolist()

    def __len__(self) -> int:
        return len(self.token)

    @cached_property
    def noise(self) -> list[float]:
        """Noise at each step and after the last: sigma of a flow, else of the variance-exploding form."""
        sigmas = getattr(self.scheduler, "sigmas", None)
        if sigmas is not None and len(sigmas) == len(self) + 1:
            return torch.as_tensor(sigmas).tolist()
        known = getattr(self.scheduler, "alphas_cumprod", None)
        if known is None:
            levels = [t / TRAINED for t in self.timesteps]
        else:
            alphas = torch.as_tensor(known).clamp(min=_LEAST_ALPHA).tolist()
            alphas = [alphas[min(max(round(t), 0), len(alphas) - 1)] for t in self.timesteps]
            levels = [((1 - a) / a) ** 0.5 for a in alphas]
        rises = levels[-1] > levels[0]  # inversion
        return [*levels, levels[-1] if rises else 0.0]

    @cached_property
    def is_flow(self) -> bool:
        """Whether the model predicts a flow's velocity."""
        config = self.scheduler.config
        flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
        return bool(flow) or "FlowMatch" in _kind(self.scheduler)

    def _time(self, noise: float) -> float:
        """What the sampler advances in at this noise, so that outputs add up by its differences.

        A flow's velocity and a predicted noise add up over sigma. A v-prediction is the velocity on a circle,
        and so is the raw output of EDM's networks; of predicted pictures the late ones count.
        """
        config = self.scheduler.config
        if self.is_flow:
            return noise
        if config.get("sigma_data") is not None:
            return math.atan(noise / config["sigma_data"])
        if config.get("prediction_type") == "v_prediction":
            return math.atan(noise)
        return -1 / max(noise, _LEAST_NOISE) if config.get("prediction_type") == "sample" else noise

    @property
    def is_stochastic(self) -> bool:
        """Whether the sampler draws fresh noise at its steps."""
        config, name = self.scheduler.config, _kind(self.scheduler)
        drawn = str(config.get("algorithm_type", "")).startswith("sde") or config.get("stochastic_sampling")
        return bool(drawn) or any(part in name for part in _STOCHASTIC)

    def course(self, begun: int, steps: int, starts: tuple[int, ...]) -> Course:
        """The noise levels of `steps` steps from index `begun` on."""
        noise = self.noise[begun : begun + steps + 1]
        levels = noise if self.is_flow else [s / (1 + s) for s in noise]
        times = [self._time(s) for s in noise]
        lengths = [b - a for a, b in pairwise(times)]
        if hasattr(self.scheduler, "sigmas_interpol"):  # KDPM2: the second evaluation of a step counts alone
            for n in range(begun % 2, len(lengths) - 1, 2):
                lengths[n : n + 2] = 0.0, lengths[n] + lengths[n + 1]
        else:
            for n, length in enumerate(lengths):
                if length == 0.0 and n:  # Heun: the two evaluations of a step have half of it each
                    lengths[n] = lengths[n - 1] = lengths[n - 1] / 2
        return Course(
            tuple(levels),
            tuple(lengths),
            starts,
            _kind(self.scheduler),
            self.is_stochastic,
            self.is_flow,
            "solver_order" in self.scheduler.config,
        )

    def position(self, timestep: Tensor, last: int | None, counted: bool) -> int | None:
        """Index of the step that is about to be computed; None: `timestep` is none of this schedule's.

        last: where the request was before; None at its beginning. counted: whether the scheduler steps in
        this very loop, so that its own count can be trusted: then nothing waits for the device.
        """
        if counted:
            index = getattr(self.scheduler, "step_index", None)
            if index is None and last is None:
                index = getattr(self.scheduler, "begin_index", None)
            if index is not None:
                return index if index < len(self) else None
        if timestep.numel() and _same_storage(timestep, self.token):  # a view of `timesteps[i]`
            return int(timestep.storage_offset() - self.token.storage_offset())
        found = self.find(float(timestep.reshape(-1)[0]), last)  # a wait
        # A model may be given another time (1 - t): the scheduler will count once it has stepped.
        return (
            0
            if found is None and counted and last is None and hasattr(self.scheduler, "step_index")
            else found
        )

    def find(self, timestep: float, last: int | None = None) -> int | None:
        """The index of `timestep`, which may be divided by 1000 and rounded to bfloat16; None if it is none.

        Where two steps have one timestep (PNDM), the one after `last` is meant.
        """
        known, best, index = self.timesteps, _NEAR * max(map(abs, self.timesteps), default=0.0), None
        for scale in (1.0, TRAINED):  # 1.0 may be the first step, divided, or near the last one, undivided
            distances = [abs(t - timestep * scale) for t in known]
            nearest = min(distances, default=math.inf)
            if nearest <= best and (index is None or nearest < best):
                found = [n for n, distance in enumerate(distances) if distance == nearest]
                index = next((n for n in found if last is not None and n > last), found[0])
                best = nearest
        return index


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and a.dtype == b.dtype
