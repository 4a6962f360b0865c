"""What every method must hold on every model."""

from dataclasses import fields, replace

import pytest
import torch
from conftest import denoise, generate, make_flux, make_inputs

import h2cache
from h2cache import find_method, method_names
from h2cache.method import Shape

OFF = {"tau1": 0.0, "tau2": 0.0, "threshold": 0.0, "interval": 1, "max_drafts": 0}
INFINITE = {"tau1": float("inf"), "tau2": float("inf"), "threshold": float("inf")}
VARIANTS = {  # further settings of a method that must hold what every method must
    "h2cache with a forecast": ("h2cache", {"predictor": "taylor", "order": 2, "repay": True}),
    "h2cache by the head's secant": ("h2cache", {"predictor": "secant", "force_detail_hit": False}),
    "taylorseer of stages": ("taylorseer", {"granularity": "stage", "interval": 3, "order": 2}),
    "taylorseer_lite of hidden states": ("taylorseer_lite", {"lite_at": "hidden", "interval": 3}),
    "hicache of stages": ("hicache", {"granularity": "stage", "interval": 3}),
    "speca of stages": ("speca", {"granularity": "stage"}),
    "clusca by Hermite": ("clusca", {"basis": "hermite", "exact_fresh": True, "interval": 3}),
    "h2cache ahead": ("h2cache", {"ahead": True, "predictor": "taylor", "repay": True, "clock": "sigma"}),
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


@pytest.fixture(params=["random", "one block each", "embedded"])
def model(request, tiny):
    models = {
        "random": make_flux,
        "one block each": lambda: make_flux(1, 1),
        "embedded": lambda: tiny.transformer,
    }
    return models[request.param]()


def inputs_for(model) -> dict:
    if model.config.in_channels == 8:
        return make_inputs()
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


def test_switched_off_is_bit_identical(method, model):
    inputs = inputs_for(model)
    expected = denoise(model, inputs=inputs)
    h2cache.enable(model, switched_off(method), steps=6)
    for a, b in zip(expected, denoise(model, inputs=inputs), strict=True):
        assert torch.equal(a, b)
    summary = h2cache.summary(model)
    assert (
        summary.blocks_run
        == summary.blocks
        == 6 * len([*model.transformer_blocks, *model.single_transformer_blocks])
    )


def test_disable_restores_exactly(method, model):
    inputs = inputs_for(model)
    before = dict(vars(model))
    keys = list(model.state_dict())
    expected = denoise(model, inputs=inputs)
    h2cache.enable(model, usual(method), steps=6)
    assert list(model.state_dict()) == keys
    denoise(model, inputs=inputs)
    h2cache.disable(model)
    after = {k: v for k, v in vars(model).items() if k != "_diffusers_hook"}  # cache_context's own doing
    assert set(after) == set(before) - {"_diffusers_hook"}
    assert all(after[k] is before[k] for k in after)
    assert "cache_context" not in vars(model)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    for a, b in zip(expected, denoise(model, inputs=inputs), strict=True):
        assert torch.equal(a, b)


def test_enabling_twice_leaves_one(method, model):
    h2cache.enable(model, usual(method), steps=6)
    h2cache.enable(model, switched_off(method), steps=6)
    assert len(model._forward_pre_hooks) == 1
    inputs = inputs_for(model)
    outputs = denoise(model, inputs=inputs)
    h2cache.disable(model)
    assert torch.equal(outputs[-1], denoise(model, inputs=inputs)[-1])


def test_every_block_is_accounted_for(method, model):
    h2cache.enable(model, usual(method), steps=6)
    denoise(model, inputs=inputs_for(model))
    records = h2cache.step_records(model)
    per_step = (
        len([*model._modules["transformer_blocks"]]),
        len([*model._modules["single_transformer_blocks"]]),
    )
    assert [r.step for r in records] == [n for n in range(6) for _ in range(2)]
    assert {r.stage: r.blocks for r in records} == {"structure": per_step[0], "detail": per_step[1]}
    assert all(0 <= r.blocks_run <= r.blocks for r in records)
    assert all(r.blocks_run == r.blocks for r in records if r.step == 0)
    assert all(r.blocks_run == r.blocks for r in records if r.outcome == "miss")


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
