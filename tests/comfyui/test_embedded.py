"""The embedded model, drawn by ComfyUI itself and by diffusers: one method, the same decisions."""

import os

import pytest
import torch

import h2cache
from h2cache import H2Config, PlanConfig
from h2cache.comfyui.cache import cache_of
from h2cache.comfyui.nodes import QUALITY, SPEED, H2CachePlan, H2CacheRule
from tests.helpers.toys import PROMPT, generate

STEPS = 50  # the shipped tuned plans are for so many
CASES = {
    "a speed": (PlanConfig(speedup=5, file="none"), lambda m: H2CachePlan().apply(m, SPEED, 5.0, 1, 30.0)),
    "a tuned plan": (
        PlanConfig(speedup=5),
        lambda m: H2CachePlan().apply(m, SPEED, 5.0, 1, 30.0, tuned="tiny_flux"),
    ),
    "a quality": (
        PlanConfig(psnr=40.0),
        lambda m: H2CachePlan().apply(m, QUALITY, 1.0, 1, 40.0, tuned="tiny_flux"),
    ),
    "the rule": (H2Config(tau1=0.35, tau2=0.2), lambda m: H2CacheRule().apply(m, 0.35, 0.2)),
    "the rule, pools": (
        H2Config(tau1=0.2, tau2=0.15, pool1=16, pool2=40, predictor="taylor"),
        lambda m: H2CacheRule().apply(m, 0.2, 0.15, 16, 40, "taylor"),
    ),
}


@pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="COMFYUI_PATH names no checkout of ComfyUI")
@pytest.mark.parametrize("case", CASES)
def test_comfyui_and_diffusers_skip_the_same(tiny, case):
    from tests.helpers.comfyui_real import Embedded, load

    config, node = CASES[case]
    h2cache.enable(tiny, config)
    wanted = generate(tiny, steps=STEPS)
    there = h2cache.summary(tiny)
    comfy = Embedded(load(), tiny)
    (cached,) = node(comfy.patcher)
    drawn = comfy.draw(cached, PROMPT, STEPS)
    here = cache_of(cached).newest.summary
    assert here.evaluated == there.evaluated
    assert here.hits == there.hits
    assert here.blocks_run * there.blocks == there.blocks_run * here.blocks
    torch.testing.assert_close(drawn, wanted, atol=2e-3, rtol=2e-3)
    if there.expected_psnr is not None:
        assert here.expected_psnr == pytest.approx(there.expected_psnr, abs=0.1)
