"""The steps of a ComfyUI sampler, known before the first: how often it calls the model, and at which noise.

ComfyUI tells the noise levels of a run, but not how often its sampler evaluates the model between them. So a
run is rehearsed: the sampler's own function is called with one number in the place of the picture.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from h2cache.engines.base import class_names
from h2cache.schedule import TRAINED, Schedule

MOST = 10_000  # evaluations: a sampler that wants more does not end
_AS_IN_DIFFUSERS = {  # so that plans that were tuned there are found
    ("sample_euler", True): "FlowMatchEulerDiscreteScheduler",
    ("sample_heun", True): "FlowMatchHeunDiscreteScheduler",
    ("sample_euler", False): "EulerDiscreteScheduler",
}


class Steps:
    """All evaluations of one run."""

    def __init__(self, sampler: Any, guider: Any, sigmas: Tensor, dimensions: int) -> None:
        known = sigmas.detach().float().cpu()
        rehearsed = _rehearse(sampler, guider, known, dimensions)
        self.sigmas: list[float] = known[:-1].tolist() if rehearsed is None else rehearsed[0]
        self._end = float(known[-1])
        self._stochastic = rehearsed is not None and rehearsed[1]
        self._name = getattr(getattr(sampler, "sampler_function", None), "__name__", type(sampler).__name__)

    def __len__(self) -> int:
        return len(self.sigmas)

    def are_at(self, position: int, sigma: float) -> bool:
        """Whether the evaluation number `position` is one at `sigma`."""
        return position < len(self) and math.isclose(self.sigmas[position], sigma, rel_tol=1e-3, abs_tol=1e-6)

    def between(self, highest: float, lowest: float) -> range:
        """The evaluations at noise from `highest` down to above `lowest`."""
        first = next((n for n, s in enumerate(self.sigmas) if s <= highest), len(self))
        last = next((n for n, s in enumerate(self.sigmas) if s <= lowest), len(self))
        return range(first, max(first, last))

    def schedule(self, model_sampling: Any) -> Schedule:
        """These evaluations as the library knows those of a diffusers scheduler."""
        kinds = class_names(model_sampling)
        flow = bool(kinds & {"CONST", "COSMOS_RFLOW"})
        prediction = "flow_prediction" if flow else "epsilon"
        if kinds & {"V_PREDICTION", "EDM"}:
            prediction = "v_prediction"
        elif kinds & {"X0", "IMG_TO_IMG"}:
            prediction = "sample"
        noise = [*self.sigmas, self._end]
        if "COSMOS_RFLOW" in kinds:
            noise = [s / (1 + s) for s in noise]
        name = _AS_IN_DIFFUSERS.get((self._name, flow), self._name)
        return Schedule(_scheduler(name, noise, flow, prediction, self._stochastic))


def _scheduler(name: str, noise: list[float], flow: bool, prediction: str, stochastic: bool) -> Any:
    """What `Schedule` reads of a scheduler of diffusers, whose class is called `name`."""
    levels = noise if flow else [s / (1 + s) for s in noise]
    values = {
        "timesteps": torch.tensor(levels[:-1], dtype=torch.float64) * TRAINED,
        "sigmas": torch.tensor(noise, dtype=torch.float64),
        "config": {"prediction_type": prediction, "stochastic_sampling": stochastic},
    }
    return type(name, (), values)()


class _Rehearsal:
    """Stands in the place of the model, as a sampler sees it, and notes the noise it is asked at."""

    def __init__(self, guider: Any, sigmas: Tensor) -> None:
        self.inner_model, self.sigmas = guider, sigmas
        self.seen: list[float] = []

    def __call__(self, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(self.seen) >= MOST:
            raise RuntimeError("this sampler does not end")
        self.seen.append(float(sigma.reshape(-1)[0]))
        denoised = x / 2  # what the sampler adds to it stays to be seen at the end
        for function in kwargs.get("model_options", {}).get(
            "sampler_post_cfg_function", ()
        ):  # the sampler's own
            given = dict.fromkeys(("denoised", "cond_denoised", "uncond_denoised"), denoised)
            denoised = function(given | {"input": x, "sigma": sigma, "model_options": {}})
        return denoised


def _rehearse(sampler: Any, guider: Any, sigmas: Tensor, dimensions: int) -> tuple[list[float], bool] | None:
    """The noise at each evaluation, and whether the sampler draws noise; None: it cannot be rehearsed."""
    function = getattr(sampler, "sampler_function", None)
    if function is None:
        return None
    seen, outcomes = [], []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for seed in (0, 1):
            torch.default_generator.manual_seed(seed)  # not those of accelerators, which nothing puts back
            model = _Rehearsal(guider, sigmas)
            further = dict(getattr(sampler, "extra_options", {}))
            extra: dict[str, Any] = {"model_options": {}, "seed": seed}
            try:
                x = torch.ones([1] * dimensions) * sigmas[0]
                outcome = function(model, x, sigmas, extra_args=extra, callback=None, disable=True, **further)
            except Exception:  # anybody's code: a run is checked against what was expected of it
                return None
            seen.append(model.seen)
            outcomes.append(outcome)
    return (seen[0], not torch.equal(*outcomes)) if seen[0] == seen[1] and seen[0] else None
