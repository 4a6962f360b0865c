"""What must hold for every method that skips: conditions, shapes, models that change; counts that mislead."""

import math

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from h2cache.baselines.block_cache import BlockCacheConfig
from h2cache.baselines.budcache import BudCacheConfig
from h2cache.baselines.clusca import ClusCaConfig
from h2cache.baselines.dicache import DiCacheConfig
from h2cache.baselines.hicache import HiCacheConfig
from h2cache.baselines.magcache import MagCacheConfig
from h2cache.baselines.none import NoneConfig
from h2cache.baselines.seacache import SeaCacheConfig
from h2cache.baselines.sencache import SenCacheConfig
from h2cache.baselines.speca import SpeCaConfig
from h2cache.baselines.spectrum import SpectrumConfig
from h2cache.baselines.taylorseer import TaylorSeerConfig
from h2cache.baselines.taylorseer_lite import TaylorSeerLiteConfig
from h2cache.baselines.teacache import TeaCacheConfig
from peft import LoraConfig

import h2cache
from h2cache import H2Config, step_records
from h2cache.memory import Memory, Request
from h2cache.program import Stage
from tests.helpers.elsewhere import Elsewhere, elsewhere
from tests.helpers.nunchaku_double import make_v1
from tests.helpers.toys import denoise, generate, make_flux, make_inputs

INF = math.inf
TEXT = make_inputs()["encoder_hidden_states"]
CONFIGS = {
    "h2cache": H2Config(tau1=INF, tau2=INF),
    "h2cache, Taylor": H2Config(tau1=INF, tau2=INF, predictor="taylor"),
    "h2cache, DMD": H2Config(tau1=INF, tau2=INF, predictor="dmd"),
    "block_cache": BlockCacheConfig(threshold=INF),
    "teacache": TeaCacheConfig(threshold=INF, coefficients=(0.0, 0.0, 0.0, 1.0, 0.0)),
    "magcache": MagCacheConfig(ratios=(1.0, 1.0), retention=0.0, max_consecutive_hits=9),
    "taylorseer": TaylorSeerConfig(warmup_steps=1),
    "taylorseer, stages": TaylorSeerConfig(warmup_steps=1, granularity="stage"),
    "taylorseer_lite": TaylorSeerLiteConfig(warmup_steps=1),
    "taylorseer_lite, hidden": TaylorSeerLiteConfig(warmup_steps=1, lite_at="hidden"),
    "hicache": HiCacheConfig(warmup_steps=1),
    "speca": SpeCaConfig(warmup_steps=1),
    "speca, stages": SpeCaConfig(warmup_steps=1, granularity="stage"),
    "clusca": ClusCaConfig(warmup_steps=1),
    "seacache": SeaCacheConfig(threshold=INF, max_consecutive_hits=None),
    "spectrum": SpectrumConfig(warmup_steps=1, window=99.0),
    "budcache": BudCacheConfig(budget=1),
    "dicache": DiCacheConfig(threshold=INF, retention=0.0),
    "sencache": SenCacheConfig(threshold=INF, early=0.0, times=(0.5,), by_latents=(1.0,), by_time=(1.0,)),
}


@pytest.fixture(params=CONFIGS)
def config(request) -> h2cache.MethodConfig:
    return CONFIGS[request.param]


def blocks_of(model, step: int) -> int:
    return sum(r.blocks_run for r in step_records(model) if r.step == step)


def call(model, **inputs) -> torch.Tensor:
    with torch.no_grad(), model.cache_context("cond"):
        return model(**(make_inputs() | {"encoder_hidden_states": TEXT} | inputs)).sample


def test_a_control_that_comes_is_a_miss_whatever_the_schedule_says(flux, config):
    samples = [torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    h2cache.enable(flux, config, steps=8)
    for n in range(6):
        control = {"controlnet_block_samples": samples} if n >= 3 else {}
        call(flux, timestep=torch.full((1,), 1 - n / 8), **control)
    assert blocks_of(flux, 3) == 7 > blocks_of(flux, 2)


@pytest.mark.parametrize("change", [{"tokens": 9}, {"batch": 2}])
def test_another_shape_starts_afresh(flux, config, change):
    h2cache.enable(flux, config, steps=8)
    call(flux)
    inputs = make_inputs(timestep=0.5, **change)
    with torch.no_grad(), flux.cache_context("cond"):
        out = flux(**inputs).sample
    assert h2cache.summary(flux).steps == 1
    h2cache.disable(flux)
    with torch.no_grad():
        assert torch.equal(out, flux(**inputs).sample)


@pytest.mark.parametrize("predictor", ["newton", "hermite", "taylor_scaled", "dmd"])
def test_no_hits_is_bit_identical_with_any_predictor(flux, predictor):
    expected = denoise(flux)
    h2cache.enable(flux, H2Config(tau1=0, tau2=0, predictor=predictor))
    assert all(map(torch.equal, expected, denoise(flux)))


# Exchanged and refused models.


@pytest.mark.parametrize("name", ["taylorseer", "taylorseer_lite"])
def test_modules_follow_a_lora_that_comes_and_goes(name):
    model = make_flux()
    plain = denoise(model)
    h2cache.enable(model, CONFIGS[name], steps=6)
    cached = denoise(model)
    lora = LoraConfig(r=2, target_modules=["proj_out", "net.2", "to_q"], init_lora_weights="gaussian")
    model.add_adapter(lora)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                weight.fill_(0.05)
    first = denoise(model)
    assert not torch.equal(first[0], cached[0])  # the LoRA acts
    h2cache.enable(model, CONFIGS[name], steps=6)  # put on anew, with the LoRA in place
    assert all(map(torch.equal, first, denoise(model)))
    model.unload_lora()
    assert all(map(torch.equal, cached, denoise(model)))
    h2cache.disable(model)
    assert all(map(torch.equal, plain, denoise(model)))


def test_a_hook_put_on_a_module_after_enabling_survives_disabling(flux):
    h2cache.enable(flux, TaylorSeerConfig(), steps=6)
    module, seen = flux.transformer_blocks[0].ff, []
    before = module.forward
    module.forward = lambda *args, **kwargs: seen.append(1) or before(*args, **kwargs)
    h2cache.disable(flux)
    denoise(flux, 2)
    assert len(seen) == 2


def test_a_refused_method_leaves_the_one_before_in_place(flux):
    h2cache.enable(flux, H2Config(tau1=INF, tau2=INF))
    expected = denoise(flux)
    flux.compile_repeated_blocks(backend="eager")
    with pytest.raises(ValueError, match="compiled"):
        h2cache.enable(flux, TaylorSeerConfig(), steps=6)
    assert h2cache.summary(flux).method == "h2cache"
    assert all(map(torch.allclose, expected, denoise(flux)))
    h2cache.disable(flux)
    assert type(flux.transformer_blocks) is torch.nn.ModuleList


def test_a_cache_of_diffusers_that_comes_later_is_refused(flux):
    from diffusers import FirstBlockCacheConfig

    h2cache.enable(flux, H2Config())
    flux.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="disable_cache"):
        denoise(flux, 1)
    flux.disable_cache()
    denoise(flux, 2)


def test_after_a_broken_off_module_the_forward_itself_is_uncached(flux):
    inputs = make_inputs()
    with torch.no_grad():
        expected = flux.forward(**inputs).sample
    h2cache.enable(flux, TaylorSeerConfig(warmup_steps=1), steps=6)

    def stop(*_):
        raise KeyboardInterrupt

    denoise(flux, 1)
    hook = flux.single_transformer_blocks[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        denoise(flux, 1)
    hook.remove()
    with torch.no_grad():
        assert torch.equal(flux.forward(**inputs).sample, expected)


# Which step, which branch.


def test_a_second_pipeline_on_the_same_parts_has_its_own_number_of_steps(tiny):
    other = FluxImg2ImgPipeline(**tiny.components)
    picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    h2cache.enable(tiny, H2Config(tau1=INF, tau2=INF, last_steps=1))
    generate(tiny, steps=10)
    assert [r.outcome for r in step_records(tiny) if r.stage == "structure"] == ["miss", *["hit"] * 8, "miss"]
    for steps, strength, taken in ((6, 1.0, 6), (12, 0.5, 6)):
        other.set_progress_bar_config(disable=True)
        other(
            "a sign", image=picture, strength=strength, num_inference_steps=steps, height=128, width=128,
            max_sequence_length=24, output_type="latent",
        )  # fmt: skip
        found = [r.outcome for r in step_records(tiny) if r.stage == "structure"]
        assert found == ["miss", *["hit"] * (taken - 2), "miss"]


def test_two_steps_of_one_rounded_timestep_are_no_two_branches(tiny):
    """In bfloat16 neighbours can be the same number; the scheduler's count tells them apart."""
    other = FluxImg2ImgPipeline(**tiny.components)  # names no branches
    other.set_progress_bar_config(disable=True)
    h2cache.enable(other, H2Config(tau1=0, tau2=0))
    hook = tiny.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"timestep": torch.full_like(kwargs["timestep"], 0.5)}),
        with_kwargs=True, prepend=True,
    )  # fmt: skip
    other(
        "a sign", image=torch.rand(1, 3, 128, 128), strength=1.0, num_inference_steps=6, height=128,
        width=128, max_sequence_length=24, output_type="latent",
    )  # fmt: skip
    hook.remove()
    assert h2cache.summary(other).branches == ("call 0",)
    assert h2cache.summary(other).steps == 6


def test_calls_at_one_timestep_do_not_pile_up_branches(flux):
    h2cache.enable(flux, H2Config())
    inputs = make_inputs()
    for _ in range(30):
        with torch.no_grad():
            flux(**inputs)
    assert len(h2cache.summary(flux).branches) <= 4


# Memory and measures.


def test_the_second_branch_finds_what_is_promised_to_the_first(flux, monkeypatch):
    config = TaylorSeerConfig(order=2, interval=1)
    h2cache.enable(flux, config, steps=4)
    denoise(flux, 4)
    needed = h2cache.summary(flux).bytes_needed
    monkeypatch.setattr("h2cache.attachment.free_bytes", lambda device: int(1.4 * needed))
    h2cache.enable(flux, config, steps=4)
    call(flux)
    with torch.no_grad(), flux.cache_context("uncond"), pytest.raises(MemoryError, match="keeps"):
        flux(**make_inputs())


def test_the_second_engine_measures_what_the_first_does_under_a_controlnet():
    """nunchaku's handle adds the control inside a block; that is no change of the block's."""
    samples = [3 * torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    measures = {}
    for name, extra in (("without", {}), ("with", {"controlnet_block_samples": samples})):
        model = make_v1()
        h2cache.enable(model, H2Config(tau1=1e9, tau2=0))
        for n in range(3):  # the same latents, or the control would change them
            call(model, timestep=torch.full((1,), 1 - n / 4), **extra)
        measures[name] = [r.measure for r in step_records(model) if r.stage == "structure"][1:]
    assert measures["with"] == pytest.approx(measures["without"], rel=1e-3)


def test_a_method_that_decides_nothing_waits_for_nothing():
    request = Request(None, 10, "test")
    memory = request.memories["cond"] = Memory(request, "cond", batch=1)
    stages = (Stage("structure", 0, 3, False), Stage("detail", 3, 7, True))
    memory.begin_step(elsewhere(1.0), ())
    Elsewhere.reads = 0
    for n in range(1, 4):
        memory.begin_step(elsewhere(1 - n / 10), ())
        list(NoneConfig().build().step(stages, memory))
    assert Elsewhere.reads == 0
    assert [r.step for r in request.records] == [1, 1, 2, 2, 3, 3]
