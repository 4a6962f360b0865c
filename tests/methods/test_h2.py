"""H2-Cache does what the paper's code does, and what we promise beyond it."""

import pytest
import torch

import h2cache
from h2cache import H2Config
from h2cache.similarity import pooled_summary, relative_l1
from tests.helpers.toys import PROMPT, denoise, generate, make_flux, make_inputs, standing_still

INF = float("inf")
PROMPTS = [
    PROMPT,
    'a blue oval badge with the word "OPEN" on a yellow background',
    'a white shirt that says "GO" on a dotted purple background',
]


def outcomes(target, stage: str) -> list[str]:
    return [r.outcome for r in h2cache.step_records(target) if r.stage == stage]


def blocks(target) -> list[tuple[int, int]]:
    """Blocks executed at every step: (structure, detail)."""
    runs = [r.blocks_run for r in h2cache.step_records(target)]
    return list(zip(runs[::2], runs[1::2], strict=True))


def test_thresholds_of_zero_give_the_uncached_image(tiny):
    latents, image = generate(tiny), generate(tiny, output_type="np")
    h2cache.enable(tiny, H2Config(tau1=0, tau2=0))
    assert torch.equal(generate(tiny), latents)
    assert (generate(tiny, output_type="np") == image).all()


def test_infinite_thresholds_run_the_two_heads(tiny):
    h2cache.enable(tiny, H2Config(tau1=INF, tau2=INF))
    generate(tiny)
    assert blocks(tiny) == [(6, 12)] + [(1, 1)] * 7
    assert outcomes(tiny, "structure") == ["miss"] + ["hit"] * 7
    assert outcomes(tiny, "detail") == ["miss"] + ["forced"] * 7


def test_detail_alone_runs_the_structure_and_one_block(tiny):
    h2cache.enable(tiny, H2Config(tau1=0, tau2=INF))
    generate(tiny)
    assert blocks(tiny) == [(6, 12)] + [(6, 1)] * 7
    assert outcomes(tiny, "detail") == ["miss"] + ["hit"] * 7


def test_a_structure_hit_never_meets_a_detail_miss(tiny):
    h2cache.enable(tiny, H2Config(tau1=0.1, tau2=0.05))
    generate(tiny, steps=20)
    pairs = set(zip(outcomes(tiny, "structure"), outcomes(tiny, "detail"), strict=True))
    assert pairs <= {("miss", "miss"), ("miss", "hit"), ("hit", "forced")}
    assert ("hit", "forced") in pairs


def reference_step(model, call: dict, state: dict, tau1: float, tau2: float, pool1: int, pool2: int):
    """The paper's step, written out over the model's parts."""
    img, txt = model.x_embedder(call["hidden_states"]), model.context_embedder(call["encoder_hidden_states"])
    temb = model.time_text_embed(call["timestep"] * 1000, call["guidance"] * 1000, call["pooled_projections"])
    rotary = model.pos_embed(torch.cat([call["txt_ids"], call["img_ids"]]))
    given = {"temb": temb, "image_rotary_emb": rotary}

    img0 = img
    txt, img = model.transformer_blocks[0](hidden_states=img, encoder_hidden_states=txt, **given)
    r1 = pooled_summary(img - img0, pool1)
    structure = "ref1" in state and relative_l1(state["ref1"], r1).item() < tau1
    if structure:
        img, txt = img + state["res1"][0], txt + state["res1"][1]
    else:
        state["ref1"], a, b = r1, img, txt
        for block in model.transformer_blocks[1:]:
            txt, img = block(hidden_states=img, encoder_hidden_states=txt, **given)
        state["res1"] = img - a, txt - b
    x0 = torch.cat([txt, img], 1)
    txt, img = model.single_transformer_blocks[0](hidden_states=img, encoder_hidden_states=txt, **given)
    x = torch.cat([txt, img], 1)
    r2 = pooled_summary(x - x0, pool2)
    detail = structure or ("ref2" in state and relative_l1(state["ref2"], r2).item() < tau2)
    if detail:
        x = x + state["res2"]
    else:
        state["ref2"], a = r2, x
        for block in model.single_transformer_blocks[1:]:
            txt, img = block(hidden_states=img, encoder_hidden_states=txt, **given)
        x = torch.cat([txt, img], 1)
        state["res2"] = x - a
    img = x[:, txt.shape[1] :]
    return model.proj_out(model.norm_out(img, temb)), (structure, detail)


@pytest.mark.parametrize(
    ("tau1", "tau2", "pool1", "pool2"), [(0.1, 0.2, 2048, 384), (0.4, 0.3, 8, 6), (0.1, 0.2, 5, 9)]
)
def test_the_step_is_the_papers(flux, tau1, tau2, pool1, pool2):
    inputs, state, steps, expected, decisions = make_inputs(), {}, 12, [], []
    latents = inputs["hidden_states"]
    with torch.no_grad():
        for n in range(steps):
            call = inputs | {"hidden_states": latents, "timestep": torch.full((1,), 1 - n / steps)}
            out, decision = reference_step(flux, call, state, tau1, tau2, pool1, pool2)
            expected.append(out)
            decisions.append(decision)
            latents = latents - out / steps
    h2cache.enable(flux, H2Config(tau1=tau1, tau2=tau2, pool1=pool1, pool2=pool2))
    got = denoise(flux, steps, inputs=inputs)
    hits = [r.outcome != "miss" for r in h2cache.step_records(flux)]
    assert list(zip(hits[::2], hits[1::2], strict=True)) == decisions
    assert 0 < sum(hits) < len(hits)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_reference_is_written_on_a_miss_only(flux):
    """Two steps that hit: the second is measured against the computed one, as if the first had not been."""
    h2cache.enable(flux, H2Config(tau1=INF, tau2=INF))
    inputs, measures = make_inputs(), {}
    latents = [inputs["hidden_states"] * (1 + 0.2 * n) for n in range(3)]
    for name, steps in (("all", (0, 1, 2)), ("one left out", (0, 2))):
        for n in steps:
            call = inputs | {"hidden_states": latents[n], "timestep": torch.full((1,), 1 - n / 10)}
            with torch.no_grad(), flux.cache_context("cond"):
                flux(**call)
        measures[name] = [r.measure for r in h2cache.step_records(flux) if r.stage == "structure"]
    assert measures["all"][2] == measures["one left out"][1]
    assert measures["all"][2] != measures["all"][1]


def test_a_constant_input_measures_zero_and_hits(flux):
    h2cache.enable(flux, H2Config(tau1=1e-9, tau2=1e-9))
    standing_still(flux, [make_inputs()] * 3)
    assert [r.measure for r in h2cache.step_records(flux)][2::2] == [0.0, 0.0]
    assert outcomes(flux, "structure") == ["miss", "hit", "hit"]


def test_what_is_not_finite_is_computed(flux):
    h2cache.enable(flux, H2Config(tau1=INF, tau2=INF))
    inputs = make_inputs()
    poisoned = inputs | {"hidden_states": torch.full_like(inputs["hidden_states"], torch.nan)}
    standing_still(flux, [inputs, poisoned, inputs])
    assert outcomes(flux, "structure") == ["miss"] * 3


# Control: what the model adds between its blocks is fresh at every step.


def control(model, batch=1, tokens=16, seed=5, double=3, single=4) -> dict:
    g = torch.Generator().manual_seed(seed)
    width = model.inner_dim
    return {
        "controlnet_block_samples": [torch.randn(batch, tokens, width, generator=g) for _ in range(double)],
        "controlnet_single_block_samples": [
            torch.randn(batch, tokens, width, generator=g) for _ in range(single)
        ],
    }


@pytest.mark.parametrize("shape", [(3, 4), (2, 2), (1, 1)])
@pytest.mark.parametrize("repeat", [False, True])
def test_a_hit_equals_a_computed_step_with_control(flux, shape, repeat):
    extra = control(flux, double=shape[0], single=shape[1]) | {"controlnet_blocks_repeat": repeat}
    inputs = make_inputs()
    with torch.no_grad():
        expected = flux(**inputs, **extra).sample
    h2cache.enable(flux, H2Config(tau1=INF, tau2=INF))
    *_, out = standing_still(flux, [inputs | extra] * 2)
    assert outcomes(flux, "detail") == ["miss", "forced"]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_a_hit_equals_a_computed_step_without_control(flux):
    inputs = make_inputs()
    with torch.no_grad():
        expected = flux(**inputs).sample
    h2cache.enable(flux, H2Config(tau1=INF, tau2=INF))
    *_, out = standing_still(flux, [inputs] * 2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_control_samples_are_added_fresh_on_hits(flux):
    """With other samples at the second step, the hit carries the new ones and none of the old."""
    inputs, first, second = make_inputs(), control(flux, seed=1), control(flux, seed=2)
    h2cache.enable(flux, H2Config(tau1=INF, tau2=INF))
    streams, heads, residuals = [], [], []
    flux.norm_out.register_forward_pre_hook(lambda m, args: streams.append(args[0]))
    for block in (flux.transformer_blocks[0], flux.single_transformer_blocks[0]):
        block.register_forward_hook(
            lambda m, args, kwargs, out: heads.append(out[1] - kwargs["hidden_states"]), with_kwargs=True
        )
    for blocks in (flux.transformer_blocks[1:], flux.single_transformer_blocks[1:]):
        for block in blocks:
            block.register_forward_hook(
                lambda m, args, kwargs, out: residuals.append(out[1] - kwargs["hidden_states"]),
                with_kwargs=True,
            )
    standing_still(flux, [inputs | first, inputs | second])
    before, after = streams
    assert (len(heads), len(residuals)) == (4, 2 + 3)  # the second step ran two heads alone
    # All that makes up the hit: the samples of the step, the fresh heads, what the first step's blocks added.
    start = flux.x_embedder(inputs["hidden_states"])
    added = sum(second["controlnet_block_samples"]) + sum(second["controlnet_single_block_samples"])
    expected = start + sum(heads[2:]) + sum(residuals) + added
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after)


def test_control_that_comes_or_goes_forces_a_miss(flux):
    inputs, extra = make_inputs(), control(flux)
    h2cache.enable(flux, H2Config(tau1=INF, tau2=INF))
    standing_still(flux, [inputs | given for given in ({}, {}, extra, extra, {})])
    assert outcomes(flux, "structure") == ["miss", "hit", "miss", "hit", "miss"]


# Batches.


def test_an_image_in_a_batch_equals_the_image_alone(tiny):
    h2cache.enable(tiny, H2Config(tau1=0.08, tau2=0.10))
    together = generate(tiny, PROMPTS, steps=16)
    skipped = {r.outcome for r in h2cache.step_records(tiny)}
    assert skipped >= {"hit", "miss"}
    for n, prompt in enumerate(PROMPTS):
        alone = generate(tiny, prompt, steps=16, seed=n)
        torch.testing.assert_close(together[n : n + 1], alone, rtol=1e-3, atol=1e-3)


def test_a_batch_skips_only_when_all_samples_agree(flux):
    """One sample stands still and one jumps: the still one keeps its old residual, the other is computed."""
    inputs = make_inputs(batch=2)
    h2cache.enable(flux, H2Config(tau1=1e-6, tau2=1e-6))
    moved = inputs["hidden_states"].clone()
    moved[1] = torch.randn(moved[1].shape, generator=torch.Generator().manual_seed(9))
    *_, out = standing_still(flux, [inputs, inputs | {"hidden_states": moved}])
    assert outcomes(flux, "structure") == ["miss", "miss"]
    h2cache.disable(flux)
    with torch.no_grad():
        expected = flux(**inputs | {"hidden_states": moved}).sample
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_reduce_mean_decides_once_for_the_batch(flux):
    inputs = make_inputs(batch=2)
    h2cache.enable(flux, H2Config(tau1=INF, tau2=INF, reduce="mean"))
    denoise(flux, 3, inputs=inputs)
    record = h2cache.step_records(flux)[4]
    assert record.outcome == "hit"
    h2cache.enable(flux, H2Config(tau1=INF, tau2=INF))
    denoise(flux, 3, inputs=inputs)
    assert h2cache.step_records(flux)[4].measure >= record.measure  # the worst sample, not the mean


# Options.


def test_first_and_last_steps_are_computed(tiny):
    h2cache.enable(tiny, H2Config(tau1=INF, tau2=INF, warmup_steps=3, last_steps=2))
    generate(tiny, steps=9)
    assert outcomes(tiny, "structure") == ["miss"] * 3 + ["hit"] * 4 + ["miss"] * 2


def test_hits_in_a_row_are_limited(tiny):
    h2cache.enable(tiny, H2Config(tau1=INF, tau2=INF, max_consecutive_hits=2))
    generate(tiny, steps=9)
    assert outcomes(tiny, "structure") == ["miss", "hit", "hit"] * 3
    assert outcomes(tiny, "detail") == ["miss", "forced", "forced"] * 3


def test_the_adaptive_threshold_follows_the_bell(tiny):
    h2cache.enable(tiny, H2Config(adaptive=True, adaptive_highest=0.4))
    generate(tiny, steps=20)
    thresholds = [r.threshold for r in h2cache.step_records(tiny) if r.stage == "structure"]
    assert thresholds[0] < 0.1
    assert max(thresholds) > thresholds[0]
    assert all(0.025 <= t <= 0.4 for t in thresholds)
    assert "hit" in outcomes(tiny, "structure")


def test_small_images_do_not_fail():
    model = make_flux()
    h2cache.enable(model, H2Config(pool1=2048, pool2=384))
    for tokens in (1, 4, 1024):
        denoise(model, 3, inputs=make_inputs(tokens=tokens))
        assert h2cache.summary(model).steps == 3


def test_bfloat16_works_and_keeps_its_dtype(flux):
    model = flux.to(torch.bfloat16)
    h2cache.enable(model, H2Config(tau1=INF, tau2=INF, pool1=4, pool2=4))
    inputs = {k: v.bfloat16() if k not in ("img_ids", "txt_ids") else v for k, v in make_inputs().items()}
    outputs = denoise(model, 3, inputs=inputs)
    assert all(out.dtype == torch.bfloat16 for out in outputs)
    tokens, pooled = 16 + 5, 32 // 5 * (21 // 5) + 32 // 4 * (16 // 4)
    assert h2cache.summary(model).bytes_held == 2 * (2 * tokens * 32 + pooled)  # two bytes a number


def test_bytes_held_are_those_of_the_specification():
    """Residuals of img and txt for both stages, 2 * (I + S) * C, and the pooled references."""
    model, tokens, text, width = make_flux(), 64, 8, 32
    h2cache.enable(model, H2Config(tau1=INF, tau2=INF, pool1=16, pool2=18))
    denoise(model, 3, inputs=make_inputs(tokens=tokens, text=text))
    residuals = 2 * (tokens + text) * width
    references = (tokens // 4) * (width // 4) + ((tokens + text) // 4) * (width // 4)
    assert h2cache.summary(model).bytes_held == 4 * (residuals + references)
