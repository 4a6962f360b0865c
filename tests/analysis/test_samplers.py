"""`--sampler`: the levels that a pipeline gets, and what is refused."""

import inspect

import numpy as np
import pytest
import torch

import h2cache
from analysis.drawing.samplers import OF_FLOWS, other_sampler
from analysis.tiny_families import FAMILIES

CALL = {"num_inference_steps": 5, "output_type": "latent"}


def drawn(pipe, call):
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipe(**{**call, **CALL, "generator": generator})[0])


# FLUX and Z-Image give sigmas and a shift to models of a fixed one too; Qwen-Image and Kontext always sigmas.
@pytest.mark.parametrize("family", ["flux", "z_image", "qwen_image", "flux_kontext"])
@pytest.mark.parametrize("name", sorted(OF_FLOWS))
def test_a_sampler_serves_every_pipeline_of_flows_and_all_steps_change_nothing(family, name):
    pipe, call = FAMILIES[family]()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = other_sampler(pipe, name)
    right = drawn(pipe, call)
    assert right.isfinite().all()
    h2cache.enable(pipe, evaluations=len(pipe.scheduler.timesteps))
    assert torch.equal(drawn(pipe, call), right)


@pytest.mark.parametrize("name", sorted(OF_FLOWS))
@pytest.mark.parametrize(("own", "shift"), [({"shift": 3.0}, 3.0), ({"use_dynamic_shifting": True}, 7.0)])
def test_levels_are_shifted_as_the_models_own(name, own, shift):
    """The share of the levels at half the way: s / (s + 1) of a shift s, give or take a step."""
    pipe, _ = FAMILIES["flux"]()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **own)
    scheduler = other_sampler(pipe, name)
    given = np.linspace(1, 1 / 100, 100).tolist()
    asked = inspect.signature(scheduler.set_timesteps).parameters.keys() & {"sigmas", "mu"}
    scheduler.set_timesteps(**{k: v for k, v in {"sigmas": given, "mu": np.log(7.0)}.items() if k in asked})
    levels = scheduler.sigmas.unique()
    assert levels[len(levels) // 2].item() == pytest.approx(shift / (shift + 1), abs=0.01)


@pytest.mark.parametrize("name", ["heun", "unipc", "dpm++"])
def test_image_to_image_takes_the_euler_sampler_only(name):
    """FLUX's would count the steps of Heun twice, and ask the others for what they do not have."""
    pipe, _ = FAMILIES["flux_img2img"]()
    with pytest.raises(ValueError, match="with the Euler sampler only"):
        other_sampler(pipe, name)
    assert type(other_sampler(pipe, "euler")) is OF_FLOWS["euler"]
