"""The baselines do what their specifications say, step by step."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from h2cache.baselines.block_cache import BlockCacheConfig
from h2cache.baselines.fewer_steps import FewerStepsConfig
from h2cache.baselines.teacache import TeaCacheConfig

import h2cache
from analysis import fit_teacache
from h2cache.api import checkpoint_name
from h2cache.registry import fitted_constants
from tests.helpers.families import recorded
from tests.helpers.toys import denoise, generate, make_flux, make_inputs

INF = float("inf")
IDENTITY = (0.0, 0.0, 0.0, 1.0, 0.0)


def blocks_run(target) -> list[int]:
    """Blocks executed at each step."""
    records = h2cache.step_records(target)
    return [
        sum(r.blocks_run for r in records if r.step == step) for step in sorted({r.step for r in records})
    ]


# Block Cache.


def test_block_cache_at_infinity_runs_the_first_block_only(flux):
    h2cache.enable(flux, BlockCacheConfig(threshold=INF))
    denoise(flux, steps=5)
    assert blocks_run(flux) == [7, 1, 1, 1, 1]


def test_block_cache_warms_up(flux):
    h2cache.enable(flux, BlockCacheConfig(threshold=INF, warmup_steps=3))
    denoise(flux, steps=5)
    assert blocks_run(flux) == [7, 7, 7, 1, 1]


@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.2, 0.5])
def test_block_cache_is_that_of_diffusers_hit_for_hit(tiny, threshold):
    executed, steps = [], 20
    attention = tiny.transformer.transformer_blocks[1].attn  # diffusers calls a block's hook on skips too
    handle = attention.register_forward_hook(lambda *_: executed.append(True))

    def per_step(pipeline, step, timestep, kwargs):
        computed.append(bool(executed))
        executed.clear()
        return kwargs

    try:
        computed: list[bool] = []
        h2cache.enable(tiny, BlockCacheConfig(threshold=threshold))
        ours = generate(tiny, steps=steps, callback_on_step_end=per_step)
        h2cache.disable(tiny)
        our_decisions, computed = computed, []
        tiny.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        theirs = generate(tiny, steps=steps, callback_on_step_end=per_step)
    finally:
        tiny.transformer.disable_cache()
        handle.remove()
    assert our_decisions == computed
    assert 2 < sum(computed) < steps
    assert torch.allclose(ours, theirs, atol=1e-5)


# TeaCache.


def test_the_polynomial_takes_the_highest_power_first():
    config = TeaCacheConfig(checkpoint="FLUX.1-dev").for_checkpoint(None)
    assert config.build().rescaled(0.1) == pytest.approx(0.2068473, abs=1e-7)


def test_teacache_at_infinity_computes_the_first_and_the_last_step(flux):
    h2cache.enable(flux, TeaCacheConfig(threshold=INF, coefficients=IDENTITY), steps=6)
    denoise(flux, steps=6)
    assert blocks_run(flux) == [7, 0, 0, 0, 0, 7]


def test_the_polynomial_is_fitted_to_each_branch_by_itself():
    """Two branches whose inputs never change: across branches there would be a change at every step."""
    inputs = [make_inputs(seed=n) for n in range(2)]
    config = fit_teacache.WatchConfig()
    model = make_flux()
    h2cache.enable(model, config)
    hook = model.register_forward_pre_hook(  # the model itself sees one timestep
        lambda m, args, kwargs: (args, kwargs | {"timestep": torch.ones(1)}), with_kwargs=True
    )
    for n in range(3):
        for name, given in zip(("cond", "uncond"), inputs, strict=True):
            with torch.no_grad(), model.cache_context(name):
                model(**given | {"timestep": torch.full((1,), 1 - n / 3)})
    hook.remove()
    assert [(step, *changes) for step, *changes in config.points] == [(n, 0.0, 0.0) for n in (1, 1, 2, 2)]


def test_a_negative_sum_does_not_skip_at_zero(flux):
    h2cache.enable(flux, TeaCacheConfig(threshold=0, coefficients=(0, 0, 0, 0, -1.0)), steps=4)
    denoise(flux, steps=4)
    assert blocks_run(flux) == [7] * 4


@pytest.mark.parametrize("threshold", [0.05, 0.15, 0.4])
def test_teacache_is_the_specification_step_by_step(tiny, threshold):
    """A straight transcription of the steps, on the modulated inputs that the model really had."""
    steps, seen = 30, []
    fitted = fitted_constants("teacache", "tiny_flux")
    norm = tiny.transformer.transformer_blocks[0].norm1
    handle = norm.register_forward_hook(lambda _, __, out: seen.append(out[0].double().numpy().copy()))
    h2cache.enable(tiny, TeaCacheConfig(threshold=threshold))
    generate(tiny, steps=steps)
    handle.remove()
    computed = [n > 0 for n in blocks_run(tiny)]

    inputs = []  # a computed step runs the norm twice: for the look, and inside block 0
    for was_computed in computed:
        inputs.append(seen.pop(0))
        if was_computed:
            assert np.array_equal(seen.pop(0), inputs[-1])
    assert not seen

    expected, total, low_high = [], 0.0, fitted["fitted_range"]
    for count, modulated in enumerate(inputs):
        if count in (0, steps - 1):
            compute, total = True, 0.0
        else:
            change = np.abs(modulated - previous).mean() / np.abs(previous).mean()  # noqa: F821
            total += np.polyval(fitted["coefficients"], np.clip(change, *low_high))
            compute = total >= threshold
            total = 0.0 if compute else total
        previous = modulated  # noqa: F841  also on skips
        expected.append(compute)
    assert computed == expected
    assert 2 < sum(computed) < steps


def test_teacache_computes_the_first_and_last_steps_asked_for(flux):
    for first, last, expected in ((1, 1, [0, 7]), (5, 0, [0, 1, 2, 3, 4]), (2, 3, [0, 1, 5, 6, 7])):
        config = TeaCacheConfig(INF, IDENTITY, warmup_steps=first, last_steps=last)
        assert config.needs_total_steps == (last > 0)
        h2cache.enable(flux, config, steps=8 if last else None)
        denoise(flux, 8)
        records = [r for r in h2cache.step_records(flux) if r.stage == "structure"]
        assert [r.step for r in records if r.outcome == "miss"] == expected
    for wrong in ({"warmup_steps": 0}, {"last_steps": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TeaCacheConfig(**wrong)


@pytest.mark.parametrize(("family", "tokens"), [("wan", 1), ("wan22_5b", None)])
def test_teacache_on_wan_keeps_what_was_estimated(family, tokens):
    """Its input is the time embedding: six of a call, or of 5B six for each token."""
    case = recorded(family)
    model, calls = case.transformers[0], []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    h2cache.enable(case.target, TeaCacheConfig(coefficients=IDENTITY))
    case.run()
    hook.remove()
    batch, count, width = calls[0].shape
    kept = 4 * batch * width * (count + 6 * (tokens or count)) * case.branches
    summary = h2cache.summary(case.target)
    assert summary.bytes_held == summary.bytes_needed == kept
    h2cache.disable(case.target)


def test_teacache_limits_hits_in_a_row(flux):
    config = TeaCacheConfig(threshold=INF, coefficients=IDENTITY, max_consecutive_hits=2)
    h2cache.enable(flux, config, steps=8)
    denoise(flux, steps=8)
    assert blocks_run(flux) == [7, 0, 0, 7, 0, 0, 7, 7]


def test_a_change_outside_the_fitted_range_counts_as_its_end():
    method = TeaCacheConfig(coefficients=IDENTITY, fitted_range=(0.1, 0.3)).build()
    assert [method.rescaled(c) for c in (0.0, 0.2, 9.0)] == [0.1, pytest.approx(0.2), 0.3]
    assert math.isnan(method.rescaled(float("nan")))


def test_clamp_takes_a_negative_value_for_nothing():
    config = TeaCacheConfig(coefficients=(0, 0, 0, 0, -1.0))
    assert config.build().rescaled(0.1) == -1
    assert replace(config, clamp=True).build().rescaled(0.1) == 0


def test_a_checkpoint_without_constants_is_refused_with_the_command():
    with pytest.raises(ValueError, match=r"analysis\.fit_teacache --model"):
        h2cache.enable(make_flux(), TeaCacheConfig(), steps=4)
    h2cache.enable(make_flux(), TeaCacheConfig(checkpoint="FLUX.1-dev"), steps=4)


def test_teacache_needs_the_number_of_steps(flux):
    with pytest.raises(ValueError, match="number of steps"):
        h2cache.enable(flux, TeaCacheConfig(coefficients=IDENTITY))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("assets/tiny_flux", "tiny_flux"),
        ("assets/tiny_flux/transformer/", "tiny_flux"),
        ("black-forest-labs/FLUX.1-dev", "FLUX.1-dev"),
        ("/x/hub/models--black-forest-labs--FLUX.1-dev/snapshots/3de6/transformer", "FLUX.1-dev"),
        ("", None),
    ],
)
def test_checkpoint_names(flux, path, name):
    flux.register_to_config(_name_or_path=path)
    assert checkpoint_name(flux) == name


# The control.


def test_fewer_steps_asks_for_fewer_steps():
    wanted = [FewerStepsConfig(factor=f).requested_steps(50) for f in (1, 2.5, 5, 100)]
    assert wanted == [50, 20, 10, 1]
    with pytest.raises(ValueError, match="factor"):
        FewerStepsConfig(factor=0.5)
