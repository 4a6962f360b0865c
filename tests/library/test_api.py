"""Attaching, detaching, and whose state is whose."""

import threading
from contextlib import nullcontext

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchHeunDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    UNet2DModel,
)
from PIL import Image

import h2cache
from h2cache import H2Config
from tests.helpers.inside import tensors_alive
from tests.helpers.toys import PROMPT, denoise, generate, make_flux, make_inputs

INF = float("inf")
ALL_HIT = H2Config(tau1=INF, tau2=INF)
OTHER = 'a yellow diamond sign that says "STOP" on a checkered blue background'


def outcomes(target, stage="structure", branch=None) -> list[str]:
    records = h2cache.step_records(target)
    return [r.outcome for r in records if r.stage == stage and branch in (None, r.branch)]


class Stop(Exception):
    pass


def stop_at(step: int, error: type[BaseException] = Stop):
    def callback(pipeline, n, timestep, kwargs):
        if n == step:
            raise error
        return kwargs

    return callback


# Whose state.


def test_prompts_sizes_and_steps_in_a_row_equal_fresh_ones(tiny):
    calls = [
        {},
        {"prompt": OTHER, "seed": 4},
        {"steps": 5},
        {"height": 96, "width": 160},
        {"height": 64, "width": 64, "steps": 6},
        {},
    ]
    config = H2Config(tau1=0.2, tau2=0.2)
    fresh = []
    for call in calls:
        h2cache.enable(tiny, config)
        fresh.append(generate(tiny, **call))
    h2cache.enable(tiny, config)
    for call, expected in zip(calls, fresh, strict=True):
        assert torch.equal(generate(tiny, **call), expected)


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("then", [{}, {"height": 64, "width": 64}, {"prompt": OTHER}])
def test_a_broken_off_call_leaves_nothing_behind(tiny, error, then):
    h2cache.enable(tiny, ALL_HIT)
    expected = generate(tiny, **then)
    with pytest.raises(error):
        generate(tiny, callback_on_step_end=stop_at(3, error))
    assert torch.equal(generate(tiny, **then), expected)


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_error_inside_a_block_leaves_nothing_behind(flux, error):
    h2cache.enable(flux, ALL_HIT)
    expected = denoise(flux)

    def fail(module, args, kwargs):
        raise error

    handle = flux.transformer_blocks[1].register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(error):
        denoise(flux)
    handle.remove()
    for a, b in zip(expected, denoise(flux), strict=True):
        assert torch.equal(a, b)


def test_forward_called_by_itself_after_ctrl_c_is_uncached(flux):
    inputs = make_inputs()
    with torch.no_grad():
        expected = flux(**inputs).sample
    h2cache.enable(flux, ALL_HIT)

    def interrupt(module, args, kwargs):
        raise KeyboardInterrupt

    handle = flux.transformer_blocks[1].register_forward_pre_hook(interrupt, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        flux(**inputs)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(flux.forward(**inputs).sample, expected)


def test_an_interrupted_pipeline_can_start_lower_with_the_same_embeddings(tiny):
    """The same tensors, the same size and a lower first timestep: only the scheduler tells the new call."""
    tiny_img = FluxImg2ImgPipeline(**{k: v for k, v in tiny.components.items() if v is not None})
    tiny_img.set_progress_bar_config(disable=True)
    embeds, pooled, _ = tiny.encode_prompt(PROMPT, PROMPT, max_sequence_length=24)
    call = {
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
        "image": torch.zeros(1, 3, 128, 128),
        "height": 128,
        "width": 128,
        "output_type": "latent",
    }

    def draw(strength, **more):
        generator = torch.Generator().manual_seed(0)
        return tiny_img(**call, strength=strength, num_inference_steps=10, generator=generator, **more).images

    h2cache.enable(tiny_img, ALL_HIT)
    expected = draw(0.5)
    with pytest.raises(Stop):
        draw(1.0, callback_on_step_end=stop_at(2))
    assert torch.equal(draw(0.5), expected)
    assert outcomes(tiny_img)[0] == "miss"


def test_image_to_image_at_zero_thresholds_is_exact(tiny):
    pipe = FluxImg2ImgPipeline(**{k: v for k, v in tiny.components.items() if v is not None})
    pipe.set_progress_bar_config(disable=True)

    def draw():
        generator = torch.Generator().manual_seed(0)
        image = torch.zeros(1, 3, 128, 128)
        return generate_with(pipe, image=image, strength=0.6, generator=generator)

    expected = draw()
    h2cache.enable(pipe, H2Config(tau1=0, tau2=0, last_steps=1))
    assert torch.equal(draw(), expected)
    h2cache.enable(pipe, H2Config(tau1=INF, tau2=INF, last_steps=1))
    draw()
    assert outcomes(pipe) == ["miss", "hit", "hit", "hit", "hit", "miss"]


def generate_with(pipe, **call):
    return pipe(
        prompt=PROMPT,
        height=128,
        width=128,
        num_inference_steps=10,
        max_sequence_length=24,
        output_type="latent",
        **call,
    ).images


def test_a_bare_transformer_starts_afresh_when_time_goes_up(flux):
    h2cache.enable(flux, ALL_HIT)
    first, second = denoise(flux), denoise(flux)
    assert outcomes(flux) == ["miss"] + ["hit"] * 5
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": 9},
        {"batch": 2},
        {"text": 7},
        {"seed": 1},
    ],
)
def test_other_inputs_start_afresh(flux, change):
    h2cache.enable(flux, ALL_HIT)
    with torch.no_grad():
        for inputs in (make_inputs(), make_inputs(**change, timestep=0.5)):
            with flux.cache_context("cond"):
                flux(**inputs)
    assert outcomes(flux) == ["miss"]
    assert h2cache.summary(flux).steps == 1


# Branches.


def test_true_guidance_keeps_its_branches_apart(tiny):
    guided = {"true_cfg_scale": 3.0, "negative_prompt": OTHER}
    expected = generate(tiny, **guided)
    h2cache.enable(tiny, H2Config(tau1=0, tau2=0))
    assert torch.equal(generate(tiny, **guided), expected)
    h2cache.enable(tiny, ALL_HIT)
    generate(tiny, **guided)
    for branch in ("cond", "uncond"):
        assert outcomes(tiny, branch=branch) == ["miss"] + ["hit"] * 7  # as much as without guidance
    generate(tiny)
    assert outcomes(tiny) == ["miss"] + ["hit"] * 7


def test_unnamed_branches_are_told_by_their_order(flux):
    """Two calls a step without a context, as Kontext and others make them, equal two runs by themselves."""
    a, b = make_inputs(seed=0), make_inputs(seed=1)
    h2cache.enable(flux, H2Config(tau1=0.4, tau2=0.4))
    alone = [denoise(flux, branch=None, inputs=i) for i in (a, b)]
    latents, together = [a["hidden_states"], b["hidden_states"]], [[], []]
    h2cache.enable(flux, H2Config(tau1=0.4, tau2=0.4))
    with torch.no_grad():
        for n in range(6):
            for k, inputs in enumerate((a, b)):
                call = inputs | {"hidden_states": latents[k], "timestep": torch.full((1,), 1 - n / 6)}
                out = flux(**call).sample
                together[k].append(out)
                latents[k] = latents[k] - out / 6
    for k in range(2):
        for x, y in zip(alone[k], together[k], strict=True):
            assert torch.equal(x, y)
    assert h2cache.summary(flux).branches == ("call 0", "call 1")
    assert "hit" in outcomes(flux, branch="call 1")


def test_a_scheduler_that_calls_twice_is_right(tiny):
    tiny.scheduler = FlowMatchHeunDiscreteScheduler()
    call = {"sigmas": None, "steps": 6}
    tiny.scheduler.register_to_config(use_flow_sigmas=True)
    set_timesteps = tiny.scheduler.set_timesteps
    tiny.scheduler.set_timesteps = lambda n, device=None, mu=None: set_timesteps(n, device=device)
    expected = generate(tiny, **call)
    h2cache.enable(tiny, H2Config(tau1=0, tau2=0))
    assert torch.equal(generate(tiny, **call), expected)
    h2cache.enable(tiny, ALL_HIT)
    generate(tiny, **call)
    assert outcomes(tiny) == ["miss"] + ["hit"] * 10


# Pipelines, threads, sharing.


def test_enabling_again_changes_the_thresholds(tiny):
    h2cache.enable(tiny, ALL_HIT)
    generate(tiny)
    h2cache.enable(tiny, H2Config(tau1=0, tau2=0))
    generate(tiny)
    assert outcomes(tiny) == ["miss"] * 8


def test_two_pipelines_keep_their_own():
    a, b = make_flux(seed=0), make_flux(seed=1)
    h2cache.enable(a, ALL_HIT)
    h2cache.enable(b, H2Config(tau1=0, tau2=0))
    denoise(a)
    denoise(b)
    assert outcomes(a).count("hit") == 5
    assert outcomes(b).count("hit") == 0
    h2cache.disable(a)
    denoise(b)
    assert len(outcomes(b)) == 6


def test_one_transformer_in_two_pipelines(tiny):
    other = FluxPipeline(**{k: v for k, v in tiny.components.items() if v is not None})
    other.scheduler = type(tiny.scheduler).from_config(tiny.scheduler.config)
    other.set_progress_bar_config(disable=True)
    h2cache.enable(tiny, ALL_HIT)
    expected = generate(tiny), generate(other, OTHER)
    with pytest.raises(Stop):
        generate(tiny, callback_on_step_end=stop_at(3))
    assert torch.equal(generate(other, OTHER), expected[1])
    assert torch.equal(generate(tiny), expected[0])
    assert torch.equal(generate(other, OTHER), expected[1])


def test_two_threads_on_one_transformer(flux):
    jobs = [make_inputs(seed=n) for n in range(2)]
    h2cache.enable(flux, H2Config(tau1=0.4, tau2=0.4))
    expected = [denoise(flux, 12, inputs=i) for i in jobs]
    results, barrier = [None, None], threading.Barrier(2)

    def work(n):
        barrier.wait()
        results[n] = denoise(flux, 12, inputs=jobs[n])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for a, b in zip(expected, results, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Living with other parts of diffusers.


def test_lora_like_changes_after_enabling_stay_after_disabling(flux):
    h2cache.enable(flux, ALL_HIT)
    replacement = make_flux(seed=3).transformer_blocks[1]
    flux.transformer_blocks[1] = replacement
    h2cache.disable(flux)
    assert flux.transformer_blocks[1] is replacement
    assert type(flux.transformer_blocks) is torch.nn.ModuleList


def test_lora_scale_and_adapters_pass_through(flux):
    from peft import LoraConfig

    inputs = make_inputs()
    h2cache.enable(flux, H2Config(tau1=0, tau2=0))
    flux.add_adapter(
        LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "proj_mlp"])
    )
    got = denoise(flux, 3, inputs=inputs, joint_attention_kwargs={"scale": 0.7})
    h2cache.disable(flux)
    for a, b in zip(got, denoise(flux, 3, inputs=inputs, joint_attention_kwargs={"scale": 0.7}), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(got[0], denoise(flux, 3, inputs=inputs, joint_attention_kwargs={"scale": 0.1})[0])


def test_ip_adapter_states_pass_through(flux):
    """A processor that consumes `ip_hidden_states` sees them in every block that runs."""
    seen = []
    forward = type(flux.transformer_blocks[0].attn.processor).__call__

    class Processor(type(flux.transformer_blocks[0].attn.processor)):
        def __call__(self, attn, hidden_states, *args, ip_hidden_states=None, **kwargs):
            seen.append(ip_hidden_states)
            return forward(self, attn, hidden_states, *args, **kwargs)

    for block in flux.transformer_blocks:
        block.attn.processor = Processor()
    h2cache.enable(flux, ALL_HIT)
    flux.encoder_hid_proj = torch.nn.Identity()
    kwargs = {"ip_adapter_image_embeds": torch.ones(1, 2, 4)}
    denoise(flux, 3, joint_attention_kwargs=kwargs)
    assert len(seen) == 3 + 1 + 1  # a full step and two heads
    assert all(s is not None for s in seen)
    assert outcomes(flux) == ["miss", "hit", "hit"]


def test_compiled_blocks_work(flux):
    h2cache.enable(flux, H2Config(tau1=0.4, tau2=0.4))
    eager = denoise(flux)
    flux.compile_repeated_blocks(backend="aot_eager")
    for a, b in zip(eager, denoise(flux), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert "hit" in outcomes(flux)


def test_the_subclass_comes_enabled_and_has_the_same_keys(tiny):
    model = h2cache.H2FluxTransformer2DModel.from_pretrained(
        "assets/tiny_flux", subfolder="transformer", cache_config=ALL_HIT
    ).float()
    assert list(model.state_dict()) == list(tiny.transformer.state_dict())
    pipe = FluxPipeline(
        **{k: v for k, v in tiny.components.items() if v is not None} | {"transformer": model}
    )
    pipe.set_progress_bar_config(disable=True)
    expected = generate(tiny)
    generate(pipe)
    assert outcomes(pipe) == ["miss"] + ["hit"] * 7
    h2cache.disable(pipe)
    assert torch.equal(generate(pipe), expected)


# Refusals.


def test_refusals_say_what_to_do(flux):
    with pytest.raises(TypeError, match=r"no engine for UNet2DModel.*FluxTransformer2DModel"):
        h2cache.enable(
            UNet2DModel(
                block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
            )
        )
    with pytest.raises(TypeError, match="str is no model"):
        h2cache.enable("flux")
    with pytest.raises(TypeError, match=r"dict.*H2Config\(tau1=0.1\)"):
        h2cache.enable(flux, {"tau1": 0.1})
    with pytest.raises(ValueError, match=r"number of steps.*steps=N"):
        h2cache.enable(flux, H2Config(last_steps=2))
    with pytest.raises(ValueError, match="no cache is enabled"):
        h2cache.summary(flux)
    with pytest.raises(ValueError, match="compile_repeated_blocks"):
        h2cache.enable(torch.compile(flux))
    flux.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="disable_cache"):
        h2cache.enable(flux)
    flux.disable_cache()
    h2cache.enable(flux)
    flux.train()
    with pytest.raises(RuntimeError, match="eval"):
        denoise(flux, 1)


def test_a_transformer_compiled_in_place_is_refused(flux):
    flux.compile(backend="eager")
    with pytest.raises(ValueError, match="compile_repeated_blocks"):
        h2cache.enable(flux)


def test_steps_can_be_told_for_a_bare_transformer(flux):
    h2cache.enable(flux, H2Config(tau1=INF, tau2=INF, last_steps=2), steps=6)
    denoise(flux, 6)
    assert outcomes(flux) == ["miss", "hit", "hit", "hit", "miss", "miss"]


def test_disable_without_enable_is_harmless(flux):
    assert h2cache.disable(flux) is flux


def test_memory_is_freed_by_disabling(flux):
    before = {id(tensor) for tensor in tensors_alive()}
    h2cache.enable(flux, ALL_HIT)
    denoise(flux)
    assert h2cache.summary(flux).bytes_held > 0
    assert {id(tensor) for tensor in tensors_alive()} - before
    h2cache.disable(flux)
    assert not {id(tensor) for tensor in tensors_alive()} - before


@pytest.mark.parametrize("steps", [6, None])
def test_memory_is_freed_after_the_last_step_where_that_is_known(flux, steps):
    h2cache.enable(flux, ALL_HIT, steps=steps)
    denoise(flux, 5)
    assert h2cache.summary(flux).bytes_of_all == h2cache.summary(flux).bytes_held > 0
    denoise(flux, 6)
    assert (h2cache.summary(flux).bytes_of_all == 0) == (steps == 6)
    assert h2cache.summary(flux).bytes_held > 0  # the most that it was
    assert len(outcomes(flux)) == 6


def test_one_timestep_again_begins_a_new_request(flux):
    h2cache.enable(flux, ALL_HIT)
    for branch in ("cond", None):
        inputs = make_inputs()
        for n, timestep in enumerate((1.0, 0.8, 0.8, 0.6)):
            moved = inputs["hidden_states"] * (1 + n)
            call = inputs | {"timestep": torch.full((1,), timestep), "hidden_states": moved}
            with torch.no_grad(), flux.cache_context(branch) if branch else nullcontext():
                flux(**call)
        assert outcomes(flux) == ["miss", "hit"]
        assert "did not fall" in h2cache.summary(flux).started_because


def test_nothing_is_printed(tiny, capsys):
    h2cache.enable(tiny, H2Config())
    generate(tiny)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


# Further pipelines around text-to-image: exact at zero, and skipping.


def around(tiny, kind: str):
    """A pipeline of another kind on the embedded model, and the arguments that are its own."""
    parts = {k: v for k, v in tiny.components.items() if v is not None}
    picture = torch.zeros(1, 3, 128, 128)
    if kind == "inpaint":
        mask = torch.zeros(1, 1, 128, 128)
        mask[..., 32:96, 32:96] = 1
        return FluxInpaintPipeline(**parts), {"image": picture, "mask_image": mask, "strength": 0.9}
    if kind == "kontext":  # reference tokens, and two unnamed calls a step under true guidance
        own = {"image": Image.new("RGB", (128, 128), "red"), "_auto_resize": False, "max_area": 128 * 128}
        return FluxKontextPipeline(**parts), own | {"negative_prompt": OTHER, "true_cfg_scale": 2.0}
    torch.manual_seed(0)
    config = dict(tiny.transformer.config, num_layers=2, num_single_layers=3)
    controlnet = FluxControlNetModel.from_config(config).eval()
    for zero in [*controlnet.controlnet_blocks, *controlnet.controlnet_single_blocks]:
        torch.nn.init.normal_(zero.weight, std=0.02)
    return FluxControlNetPipeline(**parts, controlnet=controlnet), {"control_image": picture}


@pytest.mark.parametrize("kind", ["inpaint", "kontext", "controlnet"])
def test_other_flux_pipelines(tiny, kind):
    pipe, own = around(tiny, kind)
    pipe.set_progress_bar_config(disable=True)

    def draw():
        return generate_with(pipe, generator=torch.Generator().manual_seed(0), **own)

    expected = draw()
    h2cache.enable(pipe, H2Config(tau1=0, tau2=0))
    assert torch.equal(draw(), expected)
    h2cache.enable(pipe, ALL_HIT)
    first = draw()
    branches = h2cache.summary(pipe).branches
    assert len(branches) == (2 if kind == "kontext" else 1)
    for branch in branches:
        found = outcomes(pipe, branch=branch)
        assert found == ["miss"] + ["hit"] * (len(found) - 1)
        assert len(found) >= 9
    assert torch.equal(draw(), first)
