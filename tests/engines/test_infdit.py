"""Inf-DiT on a small module of our own: what its attention sees, and a cache under Heun's sampler."""

import pytest
import torch

import h2cache
from h2cache import H2Config, PlanConfig, find_method
from h2cache.engines.infdit import Upscaler
from tests.helpers.infdit import make_infdit, picture

INF = float("inf")
LEVELS = torch.tensor([40.0, 5.0, 0.5, 0.0])


@pytest.fixture
def upscaler():
    return Upscaler(make_infdit())


def evaluate(model, x, call, sigma=5.0):
    ids = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"), -1).reshape(1, 64, 2)
    return model.precond_forward(x, torch.tensor([sigma]), call["images"], call["lr_imgs"], ids)


def test_a_block_sees_itself_and_those_left_and_above():
    """16 x 16 pixels each; layer by layer the picture flows right and down."""
    model, call = make_infdit(), picture()
    before = evaluate(model, call["noise"], call)
    for row, column in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        x = call["noise"].clone()
        x[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 1
        changed = (evaluate(model, x, call) != before).any(1)[0].unflatten(0, (2, 16)).unflatten(2, (2, 16))
        seen = changed.any(3).any(1)
        expected = torch.zeros(2, 2, dtype=torch.bool)
        expected[row:, column:] = True
        assert torch.equal(seen, expected)


@pytest.mark.parametrize(
    ("config", "hits"),
    [
        (H2Config(tau1=INF, tau2=INF), 10),
        (find_method("block_cache")(threshold=INF), 10),
        (find_method("hicache")(granularity="stage", interval=3, warmup_steps=1), 7),
        (PlanConfig(evaluations=4), 7),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_one_branch_through_both_evaluations_of_each_level(upscaler, config, hits):
    h2cache.enable(upscaler, config)
    for height in (32, 48):  # the second size begins afresh
        upscaler(**picture(height=height), num_steps=6)
        records = h2cache.step_records(upscaler)
        last = [r for r in records if r.stage == records[-1].stage]
        assert [r.step for r in last] == [*range(11)]
        assert {r.branch for r in last} == {"call 0"}
        assert sum(r.outcome != "miss" for r in last) == hits
    h2cache.disable(upscaler)


def test_a_skipped_step_still_looks_at_the_low_resolution_picture(upscaler):
    """It is cross attention of layer 0, which heads the structure stage."""
    call, outputs = picture(), []
    upscaler.scheduler.set_levels(LEVELS)
    for lr in (call["lr_imgs"], call["lr_imgs"].flip(3)):
        h2cache.enable(upscaler, H2Config(tau1=INF, tau2=INF))
        evaluate(upscaler.model, call["noise"], call, 40.0)
        outputs.append(evaluate(upscaler.model, call["noise"], call | {"lr_imgs": lr}, 5.0))
        assert {r.outcome for r in h2cache.step_records(upscaler) if r.step == 1} == {"hit", "forced"}
    h2cache.disable(upscaler)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_what_cannot_be_cached_is_refused(upscaler):
    transformer = upscaler.transformer
    h2cache.enable(transformer, H2Config())
    with pytest.raises(ValueError, match=r"Upscaler\(model\)"):
        evaluate(upscaler.model, picture()["noise"], picture())
    with pytest.raises(ValueError, match="it is not Inf-DiT's"):
        transformer(torch.ones(1, 1), None, None)
    with pytest.raises(ValueError, match="ar=False"):
        transformer(None, None, None, images=torch.ones(1), sigmas=1, emb=1, hw=(1, 1), inference=1)
    h2cache.disable(transformer)
