"""Another cache, another forward, another model, a compiled one: refused by name, whichever came first."""

from functools import partial

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

import h2cache
from h2cache import H2Config
from h2cache.plan import PlanConfig
from tests.helpers.toys import denoise, generate, make_flux, make_inputs

CONFIGS = pytest.mark.parametrize("config", [H2Config(), PlanConfig(evaluations=3)], ids=lambda c: c.name)


@CONFIGS
@pytest.mark.parametrize("first", [True, False])
def test_diffusers_own_cache_is_refused(tiny, config, first):
    tiny.transformer = make_flux()
    if first:
        tiny.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(ValueError, match="disable_cache"):
            h2cache.enable(tiny, config)
        return
    h2cache.enable(tiny, config)
    tiny.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with torch.no_grad(), pytest.raises(ValueError, match="disable_cache"):
        tiny.transformer(**make_inputs())


@CONFIGS
def test_a_cache_that_hooks_into_blocks_is_named(flux, config):
    apply_first_block_cache(flux, FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"transformer_blocks\.0 \(fbc_leader_block_hook\)"):
        h2cache.enable(flux, config)


@CONFIGS
def test_marks_of_cache_dit_and_others_are_known(flux, config):
    flux._is_cached = True
    with pytest.raises(ValueError, match="cache-dit"):
        h2cache.enable(flux, config)


@pytest.mark.parametrize("first", [True, False])
def test_another_forward_is_refused_by_methods_of_blocks(flux, first):
    def with_residuals(own, *args, **kwargs):
        return own(*args, **kwargs)

    if not first:
        h2cache.enable(flux, H2Config())
    flux.forward = partial(with_residuals, flux.forward)
    with pytest.raises(ValueError, match="with_residuals"):
        h2cache.enable(flux, H2Config()) if first else denoise(flux)


def test_the_plan_stands_before_another_forward(tiny):
    uncached, calls = generate(tiny), []

    def counted(own, *args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    tiny.transformer.forward = partial(counted, tiny.transformer.forward)
    try:
        assert torch.equal(generate(h2cache.enable(tiny, evaluations=8)), uncached)
        generate(h2cache.enable(tiny, evaluations=3))
    finally:
        del tiny.transformer.forward
    assert len(calls) == 8 + 3


def test_hooks_of_accelerate_are_no_other_forward(flux):
    uncached = denoise(flux)
    add_hook_to_module(flux, AlignDevicesHook())
    h2cache.enable(flux, H2Config(tau1=0, tau2=0))
    assert all(torch.equal(a, b) for a, b in zip(denoise(flux), uncached, strict=True))


def test_a_model_compiled_after_enable_says_what_to_do_and_is_put_back(flux):
    uncached = denoise(flux)
    h2cache.enable(flux, H2Config())
    with pytest.raises(ValueError, match="compile_repeated_blocks"):
        flux.compile(backend="eager")
    wrapped = torch.compile(flux, backend="eager")
    with torch.no_grad(), pytest.raises(ValueError, match="compile_repeated_blocks"):
        wrapped(**make_inputs())
    h2cache.disable(wrapped)
    assert all(torch.equal(a, b) for a, b in zip(denoise(flux), uncached, strict=True))
    flux.compile(backend="eager")  # as it always was


def test_a_pipeline_with_another_model_says_so_and_frees_the_old_one(tiny):
    old, new = tiny.transformer, make_flux()
    h2cache.enable(tiny, H2Config())
    tiny.transformer = new
    with pytest.raises(ValueError, match="another model"):
        h2cache.summary(tiny)
    h2cache.disable(tiny)
    with pytest.raises(ValueError, match="no cache is enabled"):
        h2cache.summary(old)
    tiny.transformer = old
