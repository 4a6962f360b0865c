"""What every method must hold on every model."""

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache

import pytest
import torch
from torch import nn

import h2cache
from h2cache import find_method, method_names
from h2cache.method import Shape
from tests.helpers.families import FLUX, RECORDED, STEPS, Case, Recorded, flux_case, recorded, refused_by
from tests.helpers.toys import denoise, generate, make_flux

INF = float("inf")
OFF = {"tau1": 0.0, "tau2": 0.0, "threshold": 0.0, "interval": 1, "max_drafts": 0, "speedup": 1.0,
       "budget": 99, "window": 1.0, "growth": 0.0}  # fmt: skip
LOOSEST = {  # what lets each method skip as much as it can
    "tau1": INF, "tau2": INF, "threshold": INF, "base": INF, "floor": INF, "interval": 99, "max_drafts": 99,
    "warmup_steps": 1, "max_consecutive_hits": 99, "retention": 0.0, "speedup": 99.0,
    "gamma": 0.0,  # ClusCa blends one token of a cluster into all, also where nothing changes
    "budget": 1, "window": 99.0, "early_threshold": INF, "last_steps": 0,
    "mix": 0.0,  # Spectrum's ridge regression makes a constant smaller
    "reuse": "output",  # EasyCache adds to its last output what the latents have moved
}  # fmt: skip
VARIANTS = {  # further settings of a method that must hold what every method must
    "h2cache with a forecast": ("h2cache", {"predictor": "taylor", "order": 2, "repay": True}),
    "h2cache by modes": ("h2cache", {"predictor": "dmd", "force_detail_hit": False}),
    "taylorseer of stages": ("taylorseer", {"granularity": "stage", "interval": 3, "order": 2}),
    "taylorseer_lite of hidden states": ("taylorseer_lite", {"lite_at": "hidden", "interval": 3}),
    "hicache of stages": ("hicache", {"granularity": "stage", "interval": 3}),
    "hicache with its own sigma": ("hicache", {"adaptive": True, "interval": 3}),
    "speca of stages": ("speca", {"granularity": "stage"}),
    "speca by Hermite": ("speca", {"basis": "hermite", "min_drafts": 1}),
    "easycache of the output": ("easycache", {"reuse": "output", "warmup_steps": 2}),
    "dicache by the excess": ("dicache", {"error": "excess", "retention": 0.0}),
    "clusca by Hermite": ("clusca", {"basis": "hermite", "exact_fresh": True, "interval": 3}),
}
HITTING = {  # what the defaults of a method need to skip some of eight steps
    "block_cache": {"threshold": INF, "max_consecutive_hits": 2},
    "budcache": {"budget": 4},
    "easycache": {"threshold": INF, "warmup_steps": 2},
    "meancache": {"budget": 4},
    "sencache": {"threshold": INF, "early": 0.0, "max_consecutive_hits": 2},
}
FITTED = {  # the random models have no constants of their own
    "coefficients": (0.0, 0.0, 0.0, 1.0, 0.0),
    "ratios": (1.0, 1.02, 0.98, 0.95),
    "times": (0.2, 0.9),
    "by_latents": (1.0, 0.4),
    "by_time": (2.0, 1.0),
}
METHODS = [*method_names(), *VARIANTS]
SKIPPING = [name for name in METHODS if name not in ("none", "fewer_steps")]
CASES = [*FLUX, "embedded", *RECORDED]
FURTHER_INPUTS = ("flux_controlnet", "flux_kontext", "wan_vace")  # of engines that other cases have too
OF_EACH_KIND = ("none", "h2cache", "block_cache", "teacache", "magcache", "taylorseer", "easycache", "plan")
VARIED = ("random", "nunchaku V1", "sd3", "wan22", "z_image")  # one of each kind, for the variants


def with_fields(config: h2cache.MethodConfig, values: dict) -> h2cache.MethodConfig:
    return replace(config, **{k: v for k, v in values.items() if k in {f.name for f in fields(config)}})


def usual(name: str) -> h2cache.MethodConfig:
    """The default settings of a method."""
    name, settings = VARIANTS.get(name, (name, {}))
    return with_fields(find_method(name)(**settings), FITTED)


def switched_off(name: str) -> h2cache.MethodConfig:
    """The settings of a method that let it skip nothing."""
    return with_fields(usual(name), OFF)


def loosest(name: str) -> h2cache.MethodConfig:
    """The settings of a method that let it skip whatever it can."""
    return with_fields(usual(name), LOOSEST)


def hitting(name: str) -> h2cache.MethodConfig:
    """Settings of a method that skip some of eight steps, and compute others."""
    return with_fields(usual(name), HITTING.get(usual(name).name, {}))


def refuses(name: str, case: str) -> bool:
    """Whether the table has it that a model refuses a method."""
    method, settings = VARIANTS.get(name, (name, {}))
    finer = settings.keys() & {"granularity", "lite_at"}  # variants that need nothing of the model
    return not finer and method in refused_by(case)


def pairs(methods: list[str]) -> pytest.MarkDecorator:
    """Every method on every model that does not refuse it; its variants on one model of each kind.

    Where only a model's inputs are others than in another case, one method of each kind is enough.
    """
    found = [
        (name, case)
        for case in CASES
        for name in methods
        if not refuses(name, case)
        and (name not in VARIANTS or case in VARIED)
        and (name in OF_EACH_KIND or case not in FURTHER_INPUTS)
    ]
    return pytest.mark.parametrize(("method", "case"), found, indirect=["case"])


@pytest.fixture
def case(request) -> Iterator[Case]:
    """A model that all tests share: nothing of a cache may be left on it."""
    if request.param == "embedded":
        case = embedded(request.getfixturevalue("_tiny_pipeline").transformer)
    else:
        case = recorded(request.param) if request.param in RECORDED else flux_case(request.param)
    yield case
    h2cache.disable(case.target)


@cache
def embedded(model: nn.Module) -> Case:
    """The embedded model, which draws 4 x 4 tokens here."""
    g = torch.Generator().manual_seed(0)
    ids = torch.zeros(16, 3)
    ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    inputs = {
        "hidden_states": torch.randn(1, 16, 64, generator=g),
        "encoder_hidden_states": torch.randn(1, 9, model.config.joint_attention_dim, generator=g),
        "pooled_projections": torch.randn(1, model.config.pooled_projection_dim, generator=g),
        "guidance": torch.full((1,), 3.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(9, 3),
    }
    return Case(model, inputs)


def enable(case: Case, config: h2cache.MethodConfig) -> None:
    h2cache.enable(case.target, config, steps=STEPS if case.target in case.transformers else None)


def of_whole(name: str) -> bool:
    """Whether a method answers for the whole model, without stages."""
    return "whole" in usual(name).requires


# What a model refuses.


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_refusals_are_those_of_the_table(case, request):
    """No more and no fewer; each with a reason, and with nothing changed."""
    name, found = request.node.callspec.params["case"], set()
    for method in METHODS:
        before = [vars(model).keys() for model in case.transformers]
        reason = refusal(case, method, refuses(method, name))
        h2cache.disable(case.target)
        assert [vars(model).keys() for model in case.transformers] == before
        if reason is not None:
            found.add(method)
            assert len(reason) >= 40
            assert usual(method).name in reason or "no scheduler" in reason
    assert found == {method for method in METHODS if refuses(method, name)}


def refusal(case: Case, method: str, expected: bool) -> str | None:
    """Why a model does not take a method; None: it does."""
    try:
        enable(case, usual(method))
        if expected:  # only a call tells whether there is a scheduler; all others are called below
            case.run()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


# What holds of every method.


@pairs(METHODS)
def test_switched_off_is_bit_identical(method, case):
    expected = case.uncached()
    enable(case, usual(method))
    enable(case, switched_off(method))  # in place of the first
    for a, b in zip(expected, case.run(), strict=True):
        assert torch.equal(a, b)
    summary = h2cache.summary(case.target)
    assert summary.blocks_run == summary.blocks
    if not of_whole(method):
        assert summary.blocks == STEPS * case.branches * sum(case.stage_sizes)
    if method not in ("none", "fewer_steps"):  # no hit at all: the user is told, and why
        assert summary.warning.startswith("nothing was")
        assert len(summary.warning) > 50


@pairs(METHODS)
def test_every_block_is_accounted_for_and_nothing_outlives_a_request_or_the_cache(method, case, request):
    expected = case.uncached()
    before = [held_by(model) for model in case.transformers]
    keys = [list(model.state_dict()) for model in case.transformers]
    enable(case, switched_off(method))
    enable(case, usual(method))  # in place of the first
    assert [list(model.state_dict()) for model in case.transformers] == keys
    first = case.run()
    check_records(case, method)
    name = request.node.callspec.params["case"]
    apart = name in (*FLUX, *VARIED) or method in ("h2cache", "plan")
    for branch in range(case.branches if apart and case.branches > 1 else 0):  # alone, as beside the other
        for a, b in zip(first[branch :: case.branches], case.run(branch), strict=True):
            assert torch.equal(a, b)
    h2cache.disable(case.target)
    assert [held_by(model) for model in case.transformers] == before
    if not isinstance(case, Recorded) or method in ("h2cache", "plan"):  # by what it draws too
        for a, b in zip(expected, case.run(), strict=True):
            assert torch.equal(a, b)


def held_by(model: nn.Module) -> dict:
    """All attributes of a model and of its parts, hooks and overridden methods among them."""
    return {
        (name, k): dict(v) if isinstance(v, dict) else v
        for name, part in model.named_modules()
        for k, v in vars(part).items()
        if k != "_diffusers_hook"  # which cache_context leaves
    }


def check_records(case: Case, method: str) -> None:
    records, summary = h2cache.step_records(case.target), h2cache.summary(case.target)
    stages = ("model",) if of_whole(method) else ("structure", "detail")
    assert sorted(r.step for r in records) == [
        n for n in range(STEPS) for _ in range(len(stages) * case.branches)
    ]
    assert len({r.branch for r in records}) == case.branches
    assert {r.stage for r in records} == set(stages)
    if not of_whole(method):
        assert summary.bytes_held <= summary.bytes_needed
    assert sum(r.blocks for r in records) == STEPS * case.branches * sum(case.stage_sizes)
    assert all(0 <= r.blocks_run <= r.blocks for r in records)
    assert all(r.blocks_run == r.blocks for r in records if r.step == 0 or r.outcome == "miss")


@pairs(SKIPPING)
def test_without_a_limit_every_step_hits_and_where_nothing_changes_a_hit_is_exact(method, case):
    """All steps but the first of each denoiser; EasyCache learns its rate from two."""
    expected = case.uncached_standing_still()
    enable(case, loosest(method))
    outputs = case.standing_still()
    records = h2cache.step_records(case.target)
    first_steps = case.fresh_starts + (len(case.transformers) if usual(method).name == "easycache" else 0)
    for stage in {r.stage for r in records}:
        missed = [r for r in records if r.stage == stage and r.outcome == "miss"]
        assert len(missed) == first_steps * case.branches
    for a, b in zip(expected, outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    heads = {"h2cache": 2, "block_cache": 1}.get(usual(method).name)
    if heads is not None:
        calls, full = STEPS * case.branches, first_steps * case.branches
        run = sum(r.blocks_run for r in records)
        assert run == full * sum(case.stage_sizes) + (calls - full) * heads


@pytest.mark.parametrize("method", [name for name in METHODS if not of_whole(name)])
def test_memory_is_what_was_reckoned(method):
    """After computing every step, all histories are full."""
    model, config = make_flux(), switched_off(method)
    h2cache.enable(model, config, steps=8)
    denoise(model, steps=8)
    shape = Shape(blocks=(3, 4), img=16, txt=5, width=32, out=8, itemsize=4)
    held = h2cache.summary(model).bytes_held
    if "clusca" in method:  # corrections are only held between computed steps
        assert held <= config.bytes_needed(shape)
    elif "speca" in method:  # nothing was checked, so that there is no error of a picture
        assert held == config.bytes_needed(shape) - 4
    else:
        assert held == config.bytes_needed(shape)


@pytest.mark.parametrize("method", METHODS)
def test_an_image_comes_out_the_same_in_a_batch_and_after_other_requests(method, tiny):
    prompts = ['a red round sign that says "CAFE" on a green background', 'a blue oval badge that says "Q"']
    small = {"height": 64, "width": 64}
    h2cache.enable(tiny, hitting(method))
    first = generate(tiny, prompts[0], seed=5, **small)
    outcomes = {r.outcome for r in h2cache.step_records(tiny)}
    assert "miss" in outcomes
    assert (len(outcomes) > 1) == (method in SKIPPING)
    both = generate(tiny, prompts, seed=5, **small)
    second = generate(tiny, prompts[1], seed=6, **small)
    for one, alone in zip(both, (first[0], second[0]), strict=True):
        assert (one - alone).norm() <= 1e-4 * alone.norm()
    assert torch.equal(first, generate(tiny, prompts[0], seed=5, **small))
