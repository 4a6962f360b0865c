"""What every method must hold on every model."""

from dataclasses import fields, replace

import pytest
import torch

import h2cache
from h2cache import find_method, method_names
from h2cache.method import Shape
from tests.helpers.families import RECORDED, STEPS, Case, flux_cases, recorded
from tests.helpers.toys import denoise, generate, make_flux

OFF = {"tau1": 0.0, "tau2": 0.0, "threshold": 0.0, "interval": 1, "max_drafts": 0}
INFINITE = {"tau1": float("inf"), "tau2": float("inf"), "threshold": float("inf")}
VARIANTS = {  # further settings of a method that must hold what every method must
    "h2cache with a forecast": ("h2cache", {"predictor": "taylor", "order": 2, "repay": True}),
    "h2cache by modes": ("h2cache", {"predictor": "dmd", "force_detail_hit": False}),
    "taylorseer of stages": ("taylorseer", {"granularity": "stage", "interval": 3, "order": 2}),
    "taylorseer_lite of hidden states": ("taylorseer_lite", {"lite_at": "hidden", "interval": 3}),
    "hicache of stages": ("hicache", {"granularity": "stage", "interval": 3}),
    "speca of stages": ("speca", {"granularity": "stage"}),
    "clusca by Hermite": ("clusca", {"basis": "hermite", "exact_fresh": True, "interval": 3}),
}
FITTED = {
    "coefficients": (0.0, 0.0, 0.0, 1.0, 0.0),
    "ratios": (1.0, 1.02, 0.98, 0.95),
}  # the random models have no constants of their own


def with_fields(config: h2cache.MethodConfig, values: dict) -> h2cache.MethodConfig:
    return replace(config, **{k: v for k, v in values.items() if k in {f.name for f in fields(config)}})


def usual(name: str) -> h2cache.MethodConfig:
    """The default settings of a method."""
    name, settings = VARIANTS.get(name, (name, {}))
    return with_fields(find_method(name)(**settings), FITTED)


def switched_off(name: str) -> h2cache.MethodConfig:
    """The settings of a method that let it skip nothing."""
    return with_fields(usual(name), OFF)


@pytest.fixture(params=[*method_names(), *VARIANTS])
def method(request) -> str:
    return request.param


@pytest.fixture(params=[*flux_cases(), "embedded", *RECORDED])
def case(request) -> Case:
    if request.param in RECORDED:
        case = recorded(request.param)
        yield case
        h2cache.disable(case.target)
    elif request.param == "embedded":
        transformer = request.getfixturevalue("tiny").transformer
        yield Case(transformer, embedded_inputs(transformer))
    else:
        yield flux_cases()[request.param]


def embedded_inputs(model) -> dict:
    g = torch.Generator().manual_seed(0)
    ids = torch.zeros(64, 3)
    ids[:, 1], ids[:, 2] = torch.arange(64) // 8, torch.arange(64) % 8
    return {
        "hidden_states": torch.randn(1, 64, 64, generator=g),
        "encoder_hidden_states": torch.randn(1, 24, model.config.joint_attention_dim, generator=g),
        "pooled_projections": torch.randn(1, model.config.pooled_projection_dim, generator=g),
        "guidance": torch.full((1,), 3.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(24, 3),
    }


def enable(case: Case, config: h2cache.MethodConfig) -> None:
    """Enable, or end the test where the method refuses the model: with a reason, and with nothing changed."""
    try:
        h2cache.enable(case.target, config, steps=STEPS if case.target in case.transformers else None)
    except ValueError as error:
        clean = not any(model._forward_hooks for model in case.transformers)
        if config.name not in str(error) or len(str(error)) < 40 or not clean:
            pytest.fail(f"a refusal must give its reason and leave no trace: {error}")
        pytest.skip(f"refused: {error}")


def test_switched_off_is_bit_identical(method, case):
    expected = case.uncached()
    enable(case, usual(method))
    enable(case, switched_off(method))  # in place of the first
    assert all(len(model._forward_pre_hooks) == 1 for model in case.transformers)
    for a, b in zip(expected, case.run(), strict=True):
        assert torch.equal(a, b)
    summary = h2cache.summary(case.target)
    assert summary.blocks_run == summary.blocks == STEPS * case.branches * sum(case.stage_sizes)


def test_disable_restores_exactly(method, case):
    expected = case.uncached()
    before = [dict(vars(model)) for model in case.transformers]
    keys = [list(model.state_dict()) for model in case.transformers]
    enable(case, usual(method))
    assert [list(model.state_dict()) for model in case.transformers] == keys
    case.run()
    h2cache.disable(case.target)
    for model, was in zip(case.transformers, before, strict=True):
        after = {k: v for k, v in vars(model).items() if k != "_diffusers_hook"}  # cache_context's own doing
        assert set(after) == set(was) - {"_diffusers_hook"}
        assert all(after[k] is was[k] for k in after)
        assert "cache_context" not in vars(model)
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
    for a, b in zip(expected, case.run(), strict=True):
        assert torch.equal(a, b)


def test_every_block_is_accounted_for_and_the_next_request_is_the_same(method, case):
    enable(case, usual(method))
    first = case.run()
    records = h2cache.step_records(case.target)
    assert sorted(r.step for r in records) == [n for n in range(STEPS) for _ in range(2 * case.branches)]
    assert len({r.branch for r in records}) == case.branches
    sizes = dict(zip(("structure", "detail"), case.stage_sizes, strict=True))
    assert {r.stage: r.blocks for r in records} == sizes
    assert all(0 <= r.blocks_run <= r.blocks for r in records)
    assert all(r.blocks_run == r.blocks for r in records if r.step == 0 or r.outcome == "miss")
    for branch in range(case.branches):  # alone, each branch is as it was beside the other
        for a, b in zip(first[branch :: case.branches], case.run(branch), strict=True):
            assert torch.equal(a, b)


def test_infinite_thresholds_run_the_heads_alone(case):
    blocks = sum(case.stage_sizes)
    for method, heads, ends in (("h2cache", 2, 1), ("block_cache", 1, 1), ("teacache", 0, 2)):
        config = with_fields(usual(method), INFINITE)
        if config.requires - h2cache.api.find_engine(case.transformers[0]).offers:
            continue  # the refusal is seen above
        h2cache.enable(case.target, config, steps=STEPS if case.target in case.transformers else None)
        case.run()
        run = sum(r.blocks_run for r in h2cache.step_records(case.target))
        calls, full = STEPS * case.branches, case.fresh_starts * case.branches
        full += (ends - 1) * len(case.transformers) * case.branches  # TeaCache computes the last step too
        assert run == full * blocks + (calls - full) * heads


def test_two_requests_are_the_same(method, tiny):
    h2cache.enable(tiny, usual(method))
    first = generate(tiny)
    generate(tiny, 'a teal hexagon badge that says "GO" on a plain white background', steps=5, seed=3)
    assert torch.equal(first, generate(tiny))


def test_memory_is_what_was_reckoned(method):
    """After computing every step, all histories are full."""
    model, config = make_flux(), switched_off(method)
    h2cache.enable(model, config, steps=8)
    denoise(model, steps=8)
    shape = Shape(blocks=(3, 4), img=16, txt=5, width=32, out=8, itemsize=4)
    held = h2cache.summary(model).bytes_held
    if "clusca" in method:  # corrections are only held between computed steps
        assert held <= config.bytes_needed(shape)
    else:
        assert held == config.bytes_needed(shape)
