"""Nothing of a method is of one kind of device: all run on one that has neither a CPU's nor a GPU's name.

Ascend's torch_npu gives PyTorch a device in the same way. A tensor made on the wrong device is an error.
"""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import h2cache
from h2cache.sparse import SparseConfig, dense, sparse
from tests.helpers.npu import OnDevice, device, moved
from tests.helpers.toys import make_flux, make_inputs
from tests.methods.test_contract import METHODS, usual, with_fields

STEPS = 6
EAGER = {"warmup_steps": 1, "interval": 3, "threshold": 0.5, "tau1": 0.5, "tau2": 0.5}  # so that all skip


class Loop:
    """A pipeline as far as a cache looks at one."""

    def __init__(self, transformer, where="cpu") -> None:
        self.transformer, self.where = transformer, where
        self.scheduler = FlowMatchEulerDiscreteScheduler()

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        inputs = {k: v.to(self.where) for k, v in make_inputs().items()}
        latents = inputs.pop("hidden_states")
        self.scheduler.set_timesteps(STEPS, device=self.where)
        levels = self.scheduler.sigmas.tolist()
        for n, t in enumerate(self.scheduler.timesteps):
            with self.transformer.cache_context("cond"):
                out = self.transformer(hidden_states=latents, **inputs | {"timestep": t[None] / 1000}).sample
            latents = latents + (levels[n + 1] - levels[n]) * out
        return latents


@pytest.fixture(scope="module")
def loops():
    with device() as npu:
        there = Loop(moved(make_flux()), npu)
    return Loop(make_flux()), there


def decisions(loop: Loop) -> list[tuple]:
    return [(r.step, r.stage, r.outcome, r.blocks_run) for r in h2cache.step_records(loop)]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_does_the_same_on_another_device(method, loops):
    here, there = loops
    config = with_fields(usual(method), EAGER)
    h2cache.enable(here, config)
    h2cache.enable(there, config)
    expected = here()
    with device():
        found = there()
        kept = h2cache.summary(there).bytes_held
        assert decisions(there) == decisions(here)
    assert found.device.type == "npu"
    assert kept == h2cache.summary(here).bytes_held
    torch.testing.assert_close(found.numbers, expected, rtol=1e-3, atol=1e-4)
    for loop in loops:
        h2cache.disable(loop)


def test_column_sparsity_does_too(loops):
    here, there = loops
    config = SparseConfig(queries=4, tokens=4, multiple=2, full_every=3)
    sparse(here, config)
    sparse(there, config)
    expected = here()
    with device():
        found = there()
    torch.testing.assert_close(found.numbers, expected, rtol=1e-3, atol=1e-4)
    for loop in loops:
        dense(loop)


def test_a_tensor_on_the_wrong_device_is_an_error():
    with device() as npu, pytest.raises(RuntimeError, match="1 tensor"):
        torch.ones(3, device=npu) + torch.ones(3)
    with device() as npu:
        assert isinstance(torch.zeros(2, device=npu) + 1, OnDevice)
