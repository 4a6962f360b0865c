"""TaylorSeer, TaylorSeer-Lite and HiCache against their specifications, and what they share."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from h2cache.baselines.clusca import ClusCaConfig
from h2cache.baselines.hicache import PRESETS, AdaptiveForecast, HiCacheConfig
from h2cache.baselines.magcache import MagCacheConfig
from h2cache.baselines.speca import SpeCaConfig
from h2cache.baselines.taylorseer import TaylorSeerConfig
from h2cache.baselines.taylorseer_lite import TaylorSeerLiteConfig
from h2cache.baselines.teacache import TeaCacheConfig

import h2cache
from h2cache import H2Config, weights
from h2cache.engines import find_engine
from h2cache.forecasting import ModuleForecast
from h2cache.method import Shape
from h2cache.policies import interval_due
from tests.helpers.families import recorded
from tests.helpers.inside import tensors_alive
from tests.helpers.toys import denoise, generate, make_flux, make_inputs


def run(model, config, steps=12, **extra):
    h2cache.enable(model, config, steps=steps)
    return denoise(model, steps=steps, **extra)


def computed(model) -> list[int]:
    return [r.step for r in h2cache.step_records(model) if r.stage == "structure" and r.outcome == "miss"]


def close(a: list, b: list, tolerance: float = 1e-5) -> bool:
    return all(torch.allclose(x, y, rtol=tolerance, atol=tolerance) for x, y in zip(a, b, strict=True))


# Schedules.


@pytest.mark.parametrize(
    ("warmup", "interval", "count"),
    [
        *[(3, 3, 18), (3, 4, 14), (3, 5, 12), (3, 6, 10), (3, 7, 9), (3, 8, 8)],
        *[(2, 4, 14), (2, 5, 11), (1, 5, 10), (1, 6, 9)],
    ],
)
def test_the_schedule_is_the_table(warmup, interval, count):
    full = [s for s in range(50) if interval_due(s, interval, warmup)]
    assert len(full) == count == warmup + (50 - warmup) // interval
    if (warmup, interval) == (3, 6):
        assert full == [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]
    c, counted = 0, []  # the authors' counter
    for s in range(50):
        if s < warmup or c == interval - 1:
            counted.append(s)
            c = 0
        else:
            c += 1
    assert full == counted


def test_the_schedule_of_diffusers_is_shifted():
    assert [s for s in range(20) if interval_due(s, 5, 3, "diffusers")] == [0, 1, 2, 4, 9, 14, 19]


# Module granularity.


def test_modules_are_forecast_as_diffusers_does(tiny):
    """The same images as diffusers' TaylorSeer with the same modules on its own schedule."""
    theirs_of = pytest.importorskip("diffusers.hooks.taylorseer_cache").TaylorSeerCacheConfig
    patterns = [
        r"transformer_blocks\.\d+\.(attn|ff|ff_context)",
        r"single_transformer_blocks\.\d+\.proj_out",
    ]
    for order in (1, 2):
        settings = theirs_of(
            cache_interval=4,
            disable_cache_before_step=2,
            max_order=order,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=patterns,
        )
        tiny.transformer.enable_cache(settings)
        theirs = generate(tiny, steps=20)
        tiny.transformer.disable_cache()
        h2cache.enable(tiny, TaylorSeerConfig(interval=4, warmup_steps=2, order=order, schedule="diffusers"))
        ours = generate(tiny, steps=20)
        h2cache.disable(tiny)
        assert torch.allclose(ours, theirs, atol=2e-4)
        assert not torch.allclose(ours, generate(tiny, steps=20), atol=2e-3)


def test_forecasts_of_recorded_outputs_are_those_of_diffusers():
    state_of = pytest.importorskip("diffusers.hooks.taylorseer_cache").TaylorSeerState
    rule = lambda times, x: weights.taylor(times, x, 2)  # noqa: E731
    ours, theirs = ModuleForecast(rule, 3), state_of(torch.float32, max_order=2)
    for step in range(12):
        theirs.current_step = step
        if step in (0, 1, 2, 4, 9):
            out = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(step))
            ours.begin_computed(float(step))
            ours.learn(0, "attn", lambda out=out: out, (), {})
            theirs.update((out,))
        else:
            ours.begin_forecast(float(step))
            assert torch.allclose(ours.predict(0, "attn", None, (), {}), theirs.predict()[0], atol=1e-4)


def test_differences_count_from_the_last_warm_up_step_on(flux):
    """With three warm-up steps, order 2 has one difference only until the next computed step."""
    both = [run(flux, TaylorSeerConfig(interval=4, order=order), steps=6) for order in (1, 2)]
    assert close(*both)
    both = [run(flux, TaylorSeerConfig(interval=4, order=order), steps=8) for order in (1, 2)]
    assert not close(*both)


def test_a_skipped_step_computes_modulation_only(flux):
    ran = []
    for name, module in flux.named_modules():
        if (
            "blocks" in name
            and isinstance(module, torch.nn.Linear)
            and not name.endswith(("mlp", "proj_out"))
        ):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    h2cache.enable(flux, TaylorSeerConfig(interval=3, warmup_steps=1))
    inputs = make_inputs()
    for n in range(2):
        ran.clear()
        with torch.no_grad(), flux.cache_context("cond"):
            flux(**inputs | {"timestep": torch.full((1,), 1 - n / 6)})
    assert len(ran) == 2 * 3 + 4  # two modulations in a double block, one in a single block
    assert {name.split(".")[2] for name in ran} == {"norm1", "norm1_context", "norm"}


def test_module_forwards_are_restored(flux):
    h2cache.enable(flux, TaylorSeerConfig())
    assert "forward" in vars(flux.transformer_blocks[0].attn)
    keys = list(flux.state_dict())
    h2cache.disable(flux)
    assert not [m for m in flux.modules() if "forward" in vars(m)]
    assert list(flux.state_dict()) == keys


def test_compiled_blocks_are_refused_for_modules(flux):
    flux.transformer_blocks[0].compile()
    with pytest.raises(ValueError, match=r'granularity="stage"'):
        h2cache.enable(flux, TaylorSeerConfig())
    assert not [m for m in flux.modules() if "forward" in vars(m)]


def test_an_engine_without_modules_refuses_and_names_the_variant(flux, monkeypatch):
    from h2cache.engines.flux_diffusers import FluxDiffusers

    monkeypatch.setattr(FluxDiffusers, "offers", frozenset())
    for config, named in (
        (TaylorSeerConfig(), 'granularity="stage"'),
        (HiCacheConfig(), 'granularity="stage"'),
        (SpeCaConfig(), 'granularity="stage"'),
        (ClusCaConfig(), "taylorseer"),
        (TaylorSeerLiteConfig(), 'lite_at="hidden"'),
    ):
        with pytest.raises(ValueError, match=named):
            h2cache.enable(flux, config, steps=6)
    run(flux, TaylorSeerConfig(granularity="stage"))


def test_branches_do_not_mix_and_a_request_starts_afresh(flux):
    config = TaylorSeerConfig(interval=3, order=2)
    cond, uncond = run(flux, config), run(flux, config, branch="uncond", inputs=make_inputs(seed=9))
    h2cache.enable(flux, config)
    inputs = make_inputs(), make_inputs(seed=9)
    latents, outputs = [i.pop("hidden_states") for i in inputs], ([], [])
    for n, b in itertools.product(range(12), range(2)):
        with torch.no_grad(), flux.cache_context(("cond", "uncond")[b]):
            out = flux(
                hidden_states=latents[b], **inputs[b] | {"timestep": torch.full((1,), 1 - n / 12)}
            ).sample
        outputs[b].append(out)
        latents[b] = latents[b] - out / 12
    assert all(torch.equal(x, y) for x, y in zip(cond, outputs[0], strict=True))
    assert all(torch.equal(x, y) for x, y in zip(uncond, outputs[1], strict=True))


def test_threads_do_not_mix():
    from concurrent.futures import ThreadPoolExecutor

    model, config = make_flux(), TaylorSeerConfig(interval=3)
    expected = [run(model, config, inputs=make_inputs(seed=s)) for s in range(3)]
    h2cache.enable(model, config)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda s: denoise(model, steps=12, inputs=make_inputs(seed=s)), range(3)))
    for a, b in zip(expected, results, strict=True):
        assert close(a, b)


@pytest.mark.parametrize("granularity", ["module", "stage"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_memory_is_the_formula(flux, granularity, order):
    config = TaylorSeerConfig(interval=2, order=order, granularity=granularity)
    run(flux, config)
    shape = Shape(blocks=(3, 4), img=16, txt=5, width=32, out=8, itemsize=4)
    assert h2cache.summary(flux).bytes_held == config.bytes_needed(shape)


CONFIGS = (
    TaylorSeerConfig(interval=2, order=2),
    HiCacheConfig(interval=3),
    ClusCaConfig(interval=3, clusters=3),
)


@pytest.mark.parametrize(
    "family", ["flux_kontext", "flux_controlnet", "hunyuan_image", "hunyuan_video", "qwen_image_edit"]
)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_text_that_nobody_reads_changes_no_picture(config, family, monkeypatch):
    """Where the engine does not say where text is, it is forecast as the authors do."""
    case = recorded(family)
    h2cache.enable(case.target, config)
    without, held = case.run(), h2cache.summary(case.target).bytes_held
    engine = type(find_engine(case.transformers[0]))
    own = engine.modules
    monkeypatch.setattr(engine, "modules", lambda self, block: replace(own(self, block), text={}))
    h2cache.enable(case.target, replace(config))
    assert all(map(torch.equal, without, case.run()))
    assert held < h2cache.summary(case.target).bytes_held
    h2cache.disable(case.target)


@pytest.mark.parametrize("config", CONFIGS[:2], ids=lambda c: c.name)
def test_what_is_held_is_no_part_of_something_larger(flux, config):
    """A view would keep all of the tensor that it is cut from."""
    before = {id(tensor) for tensor in tensors_alive()}
    h2cache.enable(flux, replace(config, interval=1), steps=12)
    denoise(flux, 8)
    kept = [tensor for tensor in tensors_alive() if id(tensor) not in before and tensor.shape[-1] == 32]
    held = {s.data_ptr(): len(s) for s in (tensor.untyped_storage() for tensor in kept)}
    shape = Shape(blocks=(3, 4), img=16, txt=5, width=32, out=8, itemsize=4)
    assert sum(held.values()) == config.bytes_needed(shape)


def test_the_estimate_has_ip_adapters_output_of_attention(flux):
    forward = type(flux.transformer_blocks[0].attn.processor).__call__

    class Processor(type(flux.transformer_blocks[0].attn.processor)):
        def __call__(self, attn, hidden_states, *args, ip_hidden_states=None, **kwargs):
            img, txt = forward(self, attn, hidden_states, *args, **kwargs)
            return img, txt, img * 0.1

    for block in flux.transformer_blocks:
        block.attn.processor = Processor()
    flux.encoder_hid_proj = torch.nn.Identity()
    held = []
    for config in (TaylorSeerConfig(interval=2), SpeCaConfig(max_drafts=0)):
        h2cache.enable(flux, config, steps=8)
        denoise(flux, 8, joint_attention_kwargs={"ip_adapter_image_embeds": torch.ones(1, 2, 4)})
        held.append(h2cache.summary(flux).bytes_held)
        shape = Shape((3, 4), img=16, txt=5, width=32, out=8, itemsize=4, attention_parts=3)
        assert h2cache.summary(flux).bytes_needed == config.bytes_needed(shape)
        unchecked = 4 if config.name == "speca" else 0  # no draft, so that there is no error of a picture
        assert held[-1] == config.bytes_needed(shape) - unchecked
    assert held[0] == 2 * (3 * 3 + 4) * 16 * 32 * 4


def test_memory_of_flux_dev_is_that_of_the_specification():
    dev = Shape(blocks=(19, 38), img=4096, txt=512, width=3072, out=64)
    for config, mib in (
        (TaylorSeerConfig(), 3648),
        (TaylorSeerConfig(order=2), 5472),
        (HiCacheConfig(), 5472),
        (TaylorSeerConfig(granularity="stage"), 108),
        (TaylorSeerLiteConfig(), 1.5),
        (TaylorSeerLiteConfig(order=1, lite_at="hidden"), 48),
        (MagCacheConfig(), 24),
        (TeaCacheConfig(), 48),
        (H2Config(), 54 + 6 + 384 * 256 * 2 / 2**20),
        (H2Config(predictor="taylor", repay=True), 3 * 54 + 6 + 384 * 256 * 2 / 2**20),
    ):
        assert config.bytes_needed(dev) == mib * 2**20


# TaylorSeer-Lite and HiCache.


@pytest.mark.parametrize("lite_at", ["output", "hidden"])
def test_lite_skips_all_blocks_and_keeps_one_tensor(flux, lite_at):
    run(flux, TaylorSeerLiteConfig(interval=4, lite_at=lite_at))
    assert [r.blocks_run for r in h2cache.step_records(flux) if r.step in (3, 4, 5)] == [0] * 6
    assert computed(flux) == [0, 1, 2, 6, 10]
    width = {"output": 8, "hidden": 32}[lite_at]
    assert h2cache.summary(flux).bytes_held == 3 * 16 * width * 4


def test_lite_continues_a_line():
    """A model whose output is linear in the timestep is forecast exactly at its output."""
    model = make_flux(1, 1)
    inputs = make_inputs()
    plain = model.proj_out.forward
    now = {"t": 0.0}
    model.proj_out.forward = lambda x: plain(torch.ones_like(x)) * now["t"]
    outputs = []
    h2cache.enable(model, TaylorSeerLiteConfig(interval=4, order=1))
    for n in range(8):
        now["t"] = float(n)
        with torch.no_grad(), model.cache_context("cond"):
            outputs.append(model(**inputs | {"timestep": torch.full((1,), 1 - n / 8)}).sample)
    for n in range(3, 8):
        assert torch.allclose(outputs[n], outputs[1] * n, atol=1e-5)
    h2cache.disable(model)
    assert model.proj_out.forward is not plain  # what stood there before is back


@pytest.mark.parametrize("granularity", ["module", "stage"])
def test_hicache_meets_taylorseer(flux, granularity):
    common = {"interval": 4, "granularity": granularity}
    taylor = [run(flux, TaylorSeerConfig(order=order, **common)) for order in (1, 2)]
    hermite = run(flux, HiCacheConfig(order=1, sigma=math.sqrt(0.5), **common))
    assert close(taylor[0], hermite, 1e-4)
    scaled = run(flux, HiCacheConfig(order=2, sigma=1.0, basis="taylor", **common))
    assert close(taylor[1], scaled, 1e-4)
    reuse = run(flux, TaylorSeerConfig(order=0, **common))
    assert close(reuse, run(flux, HiCacheConfig(order=2, sigma=1e-3, **common)), 1e-3)


def test_adaptive_sigma_is_the_formula():
    """Of a module of two images, one of which moves ten times as far."""
    config = HiCacheConfig(adaptive=True, alpha=0.8, order=2)
    forecast, q = AdaptiveForecast(config), torch.ones(2)
    g = torch.Generator().manual_seed(0)
    outs = [torch.randn(2, 6, 4, generator=g) * torch.tensor([1.0, 10.0])[:, None, None] for _ in range(3)]
    for at, out in zip((2.0, 5.0, 8.0), outs, strict=True):
        forecast.begin_computed(at)
        assert forecast.learn(0, "ff", lambda x=out: x, (), {}) is out
    for old, new in itertools.pairwise(outs):
        first = (new - old) / 3
        q = 0.99 * q + 0.01 * first.square().sum(-1).sqrt().mean(-1) ** 2
    sigma = [min(1.0, 0.8 / (math.sqrt(2) * float(n) + 1e-6)) for n in q]
    assert 0 < sigma[1] < sigma[0] < 1
    forecast.begin_forecast(10.0)
    got = forecast.predict(0, "ff", None, (), {})
    for n, s in enumerate(sigma):
        row = weights.hermite([2.0, 5.0, 8.0], 10.0, 2, s)
        expected = sum(w * out[n] for w, out in zip(row, outs, strict=True))
        assert torch.allclose(got[n], expected, rtol=1e-4, atol=1e-5)


def test_adaptive_sigma_is_refused_where_it_does_not_apply():
    for wrong in ({"granularity": "stage"}, {"basis": "taylor"}):
        with pytest.raises(ValueError, match="leave both at their defaults"):
            HiCacheConfig(adaptive=True, **wrong)
    with pytest.raises(ValueError, match="alpha=0"):
        HiCacheConfig(adaptive=True, alpha=0)


def test_presets_of_hicache_are_the_published_settings():
    assert len([s for s in range(50) if interval_due(s, PRESETS["paper, FLUX.1-dev"].interval, 3)]) == 9
    with pytest.warns(UserWarning, match="order=4"):
        HiCacheConfig(order=4)
