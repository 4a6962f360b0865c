"""Real pipelines of every family, of tiny random weights: whole calls, and what is particular to each."""

import importlib

import diffusers.pipelines.qwenimage
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from h2cache.baselines.block_cache import BlockCacheConfig
from h2cache.baselines.teacache import TeaCacheConfig

import h2cache
from analysis.tiny_families import FAMILIES
from h2cache import H2Config
from h2cache.engines import find_engine
from h2cache.memory import Memory, Request
from tests.helpers.families import recorded, transformers_of

INF = float("inf")
OFF, ALL_HIT = H2Config(tau1=0.0, tau2=0.0), H2Config(tau1=INF, tau2=INF)
LINE = (0.0, 0.0, 0.0, 1.0, 0.0)  # TeaCache's polynomial: the change itself


def draw(pipeline, call: dict, steps: int = 4, **other) -> torch.Tensor:
    """Picture or frames as a tensor of numbers in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    out = pipeline(
        **call | other, num_inference_steps=steps, generator=generator, output_type="np", return_dict=False
    )
    return torch.as_tensor(out[0])


def other_request(call: dict) -> dict:
    """The same call with another prompt."""
    if "prompt" in call:
        return call | {"prompt": "two blue triangles on green"}
    if "class_labels" in call:
        return call | {"class_labels": [7]}
    return call | {"prompt_embeds": call["prompt_embeds"].flip(1) * 0.5}


@pytest.fixture
def small_references(monkeypatch) -> None:
    """Qwen brings references to a megapixel, whose encoding takes longer than all that is tried here."""
    pipelines = diffusers.pipelines.qwenimage
    for name in ("pipeline_qwenimage_edit", "pipeline_qwenimage_edit_plus"):
        module = importlib.import_module(f"{pipelines.__name__}.{name}")
        own = module.calculate_dimensions
        monkeypatch.setattr(
            module, "calculate_dimensions", lambda area, ratio, own=own: own(area / 16, ratio)
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("small_references")
def test_a_pipeline_of_each_family(family):
    pipeline, call = FAMILIES[family]()
    expected = draw(pipeline, call)
    assert expected.isfinite().all()
    assert expected.std() > 0

    h2cache.enable(pipeline, OFF)
    assert torch.equal(draw(pipeline, call), expected)
    assert h2cache.summary(pipeline).block_ratio == 1

    h2cache.enable(pipeline, ALL_HIT)
    cached = draw(pipeline, call)
    assert not torch.equal(cached, expected)
    summary = h2cache.summary(pipeline)
    assert summary.block_ratio > 1.2
    assert summary.bytes_held > 0
    assert summary.bytes_of_all == 0  # it has ended

    draw(pipeline, other_request(call), steps=3)  # another prompt, other times
    if call.get("height") == 32:
        draw(pipeline, call, height=64)  # another shape
    assert torch.equal(draw(pipeline, call), cached)

    h2cache.disable(pipeline)
    assert torch.equal(draw(pipeline, call), expected)


# Reference tokens.


@pytest.mark.parametrize(
    ("family", "drawn"),
    [
        ("flux", None),
        ("flux_kontext", 64),
        ("flux2", None),
        ("flux2_klein", 64),
        ("flux2_klein_kv", None),  # its references are there in the first step only
        ("qwen_image", None),
        ("qwen_image_edit", 4),
        ("qwen_image_edit_plus", 4),
        ("z_image", 64),  # its text comes after
    ],
)
def test_only_tokens_that_are_drawn_are_looked_at(family, drawn):
    for model, _, args, kwargs in recorded(family).calls:
        inputs = find_engine(model).inputs(tuple(args), kwargs)
        assert inputs.targets() == (None if drawn is None else slice(drawn))


# Guidance in one batch.


def test_both_halves_of_a_guided_batch_share_the_larger_measure():
    memory = Memory(Request(None, None, "test"), "cond", batch=4, guided=True)
    memory.begin_step(1.0, ())
    assert memory.read(torch.tensor([1.0, 2.0, 3.0, 0.5])) == [3.0, 2.0, 3.0, 2.0]
    assert memory.read(torch.tensor([1.0])) == [1.0]  # one measure over the batch
    nan = memory.read(torch.tensor([float("nan"), 1.0, 2.0, 3.0]))
    assert nan[0] != nan[0]
    assert nan[2] != nan[2]


def batches(pipeline, call: dict, **other) -> set[tuple[int, bool]]:
    """Batch size of the transformer's calls, and whether they are taken for [cond, uncond]."""
    seen, engine = set(), find_engine(pipeline.transformer)

    def note(model, args, kwargs) -> None:
        inputs = engine.inputs(args, kwargs)
        seen.add((len(inputs.latents), inputs.guided()))

    hook = pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    draw(pipeline, call, **other)
    hook.remove()
    return seen


@pytest.mark.parametrize(("family", "unguided"), [("dit", 1.0), ("sd3", 1.0), ("z_image", 0.0)])
def test_guidance_in_one_batch_is_noticed(family, unguided):
    pipeline, call = FAMILIES[family]()
    assert batches(pipeline, call) == {(2, True)}
    assert batches(pipeline, call, guidance_scale=unguided) == {(1, False)}


def test_two_pictures_in_one_batch_are_not_guidance():
    pipeline, _ = FAMILIES["dit"]()
    assert batches(pipeline, {"class_labels": [1, 2]}, guidance_scale=1.0) == {(2, False)}
    assert batches(pipeline, {"class_labels": [1, 2]}) == {(4, True)}


# Two transformers.


def test_wan22_steps_are_numbered_through_and_each_transformer_ends_its_own():
    pipeline, call = FAMILIES["wan22"]()
    assert h2cache.enable(pipeline, H2Config(tau1=INF, tau2=INF, last_steps=1)) is pipeline
    draw(pipeline, call, steps=8)
    high = int((pipeline.scheduler.timesteps >= 900).sum())
    assert 2 < high < 6
    records = [r for r in h2cache.step_records(pipeline) if r.branch == "cond" and r.stage == "structure"]
    assert [r.step for r in records] == list(range(8))
    outcomes = [r.outcome for r in records]
    for part in (outcomes[:high], outcomes[high:]):  # first and last of each are computed
        assert part == ["miss", *["hit"] * (len(part) - 2), "miss"]
    assert [r.timestep for r in records] == sorted((r.timestep for r in records), reverse=True)

    draw(pipeline, call, steps=1)  # the second transformer has no part in this
    assert {r.step for r in h2cache.step_records(pipeline)} == {0}
    h2cache.disable(pipeline)
    for transformer in transformers_of(pipeline):
        with pytest.raises(ValueError, match="no cache is enabled"):
            h2cache.summary(transformer)


def test_a_timestep_for_each_token_counts_by_its_last():
    case = recorded("wan22_5b")
    h2cache.enable(case.target, ALL_HIT)
    case.run()
    times = [r.timestep for r in h2cache.step_records(case.target) if r.branch == "cond"]
    assert times[0] > 0.9
    assert times == sorted(times, reverse=True)
    h2cache.disable(case.target)


# The cut.


@pytest.mark.parametrize(
    ("family", "split", "sizes"),
    [
        ("wan", None, (2, 4)),
        ("wan", 5, (5, 1)),
        ("wan", 0.5, (3, 3)),
        ("flux", None, (3, 4)),
        ("flux", 5, (5, 2)),  # the structure stage reaches into the second list
        ("flux2", 4, (4, 3)),  # and so across the joining of the streams
        ("flux2", 1, (1, 6)),
    ],
)
def test_where_the_stages_are_cut_can_be_told(family, split, sizes):
    case = recorded(family)
    h2cache.enable(case.target, OFF, split=split)
    for a, b in zip(case.uncached(), case.run(), strict=True):
        assert torch.equal(a, b)
    records = h2cache.step_records(case.target)
    assert {r.stage: r.blocks for r in records} == {"structure": sizes[0], "detail": sizes[1]}

    h2cache.enable(case.target, H2Config(tau1=0.0, tau2=INF), split=split)
    case.run()
    later = [r.blocks_run for r in h2cache.step_records(case.target) if r.step > 0]
    assert set(later[::2]) == {sizes[0]}  # every structure stage is computed,
    assert set(later[1::2]) == {1}  # of every detail stage the head alone
    h2cache.disable(case.target)


@pytest.mark.parametrize("split", [0, 6, 7, -1, 0.999])
def test_a_stage_without_a_block_is_refused(split):
    pipeline, _ = FAMILIES["wan"]()
    with pytest.raises(ValueError, match=r"split=.* cuts the 6 blocks"):
        h2cache.enable(pipeline, ALL_HIT, split=split)
    with pytest.raises(ValueError, match="no cache is enabled"):
        h2cache.summary(pipeline)


def test_skip_layer_guidance_is_refused_when_it_is_asked_for():
    pipeline, call = FAMILIES["sd3"]()
    h2cache.enable(pipeline, ALL_HIT)
    with pytest.raises(ValueError, match="skip_guidance_layers"):
        draw(pipeline, call, skip_guidance_layers=[1], skip_layer_guidance_stop=1.0)
    h2cache.disable(pipeline)
    draw(pipeline, call, skip_guidance_layers=[1], skip_layer_guidance_stop=1.0)


def test_sd3_controlnet_residuals_reach_every_block():
    """The model asks each block whether it is the last, the skipped ones too."""
    case = recorded("sd3")
    model, _, args, kwargs = case.calls[0]
    hidden = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
    control = kwargs | {"block_controlnet_hidden_states": [hidden, hidden * 2]}
    with torch.no_grad():
        expected = model(*args, **control)[0]
        h2cache.enable(model, ALL_HIT)
        hook = model.register_forward_pre_hook(  # the model itself sees one timestep
            lambda m, a, k: (a, k | {"timestep": kwargs["timestep"]}), with_kwargs=True
        )
        first, again = (model(*args, **control | {"timestep": kwargs["timestep"] - n})[0] for n in range(2))
        hook.remove()
    assert h2cache.summary(model).hits == {"structure": 1, "detail": 1}
    assert torch.equal(first, expected)
    assert torch.allclose(again, expected, atol=1e-5)  # nothing has changed: what was kept fits
    h2cache.disable(model)


# What else sits on a transformer.

METHODS = [ALL_HIT, BlockCacheConfig(threshold=INF), TeaCacheConfig(threshold=INF, coefficients=LINE)]


@pytest.mark.parametrize("config", METHODS, ids=lambda c: c.name)
@pytest.mark.parametrize(("family", "blocks"), [("wan", 1), ("wan", 4), ("flux2", 3)])
def test_group_offloading_brings_the_blocks_that_run(tmp_path, config, family, blocks):
    """On disk, so that a block that nobody brought back would compute with memory that was never written."""
    pipeline, call = FAMILIES[family]()
    h2cache.enable(pipeline, config)
    expected = draw(pipeline, call)
    for before in (True, False):
        pipeline, call = FAMILIES[family]()
        if before:
            h2cache.enable(pipeline, config)
        apply_group_offloading(
            pipeline.transformer,
            onload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=blocks,
            offload_to_disk_path=str(tmp_path / str(before)),
        )
        if not before:
            h2cache.enable(pipeline, config)
        assert torch.allclose(draw(pipeline, call), expected, atol=1e-4)


@pytest.mark.parametrize("config", METHODS, ids=lambda c: c.name)
@pytest.mark.parametrize("family", ["wan22", "qwen_image", "flux2_klein_kv"])
def test_layerwise_casting(config, family):
    pipeline, call = FAMILIES[family]()
    for transformer in transformers_of(pipeline):
        transformer.enable_layerwise_casting(torch.bfloat16, torch.float32)
    expected = draw(pipeline, call, steps=6)
    h2cache.enable(pipeline, config)
    assert draw(pipeline, call, steps=6).isfinite().all()
    assert h2cache.summary(pipeline).block_ratio > 1.2
    h2cache.disable(pipeline)
    assert torch.equal(draw(pipeline, call, steps=6), expected)


@pytest.mark.parametrize("family", ["flux2", "wan"])
def test_blocks_compiled_before_and_after(family):
    pipeline, call = FAMILIES[family]()
    h2cache.enable(pipeline, ALL_HIT)
    expected = draw(pipeline, call)
    pipeline.transformer.compile_repeated_blocks(backend="eager")
    assert torch.allclose(draw(pipeline, call), expected, atol=1e-4)
    h2cache.enable(pipeline, ALL_HIT)
    assert torch.allclose(draw(pipeline, call), expected, atol=1e-4)
    assert h2cache.summary(pipeline).block_ratio > 1.2


def test_model_offload_keeps_working():
    pipeline, call = FAMILIES["wan22"]()
    h2cache.enable(pipeline, ALL_HIT)
    expected = draw(pipeline, call)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(pipeline, call), expected)
    h2cache.enable(pipeline, OFF)
    draw(pipeline, call)
    assert h2cache.summary(pipeline).block_ratio == 1
