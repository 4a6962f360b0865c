"""H2-Cache with a forecast in place of the last residual."""

from dataclasses import replace

import pytest
import torch

import h2cache
from h2cache import H2Config
from h2cache.program import Stream
from tests.helpers.toys import denoise, generate

INF = float("inf")
SMALL = {"height": 64, "width": 64}


def run(model, config, steps=12, **extra):
    h2cache.enable(model, config, steps=steps)
    return denoise(model, steps=steps, **extra)


def computed(model, stage="structure") -> list[int]:
    return [r.step for r in h2cache.step_records(model) if r.stage == stage and r.outcome == "miss"]


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * torch.log10(((a - b) ** 2).mean() / b.var()))


def test_the_default_is_the_paper(flux):
    """No forecast, no clock: bit for bit what it was."""
    expected = run(flux, H2Config(tau1=0.3, tau2=0.3))
    spelt = H2Config(tau1=0.3, tau2=0.3, predictor="last", order=3, sigma=0.1, clock="sigma")
    for a, b in zip(expected, run(flux, spelt), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("predictor", ["taylor", "newton"])
def test_a_forecast_comes_closer_at_equal_decisions(tiny, predictor):
    """The embedded model, compared at a fixed pattern of hits."""
    exact = generate(tiny, steps=30, **SMALL)
    results = {}
    for name in ("last", predictor):
        config = H2Config(tau1=INF, tau2=INF, max_consecutive_hits=2, warmup_steps=3, predictor=name)
        h2cache.enable(tiny, config)
        results[name] = psnr(generate(tiny, steps=30, **SMALL), exact)
        blocks = h2cache.summary(tiny).blocks_run
        assert results.setdefault("blocks", blocks) == blocks
    assert results[predictor] > results["last"] + 1


@pytest.mark.parametrize("predictor", ["taylor", "newton", "hermite", "taylor_scaled", "dmd"])
def test_a_batch_decides_and_forecasts_each_sample_alone(tiny, predictor):
    prompts = [
        'a red round sign that says "GO" on a white background',
        'a teal shirt that says "B" on a dotted pink background',
    ]
    config = H2Config(tau1=0.3, tau2=0.2, predictor=predictor, clock="sigma")
    h2cache.enable(tiny, config)
    alone = [generate(tiny, p, steps=14, seed=n, **SMALL) for n, p in enumerate(prompts)]
    h2cache.enable(tiny, config)
    together = generate(tiny, prompts, steps=14, **SMALL)
    assert torch.allclose(together, torch.cat(alone), atol=2e-3)


def test_the_detail_stage_can_be_asked_after_a_structure_hit(flux):
    run(flux, H2Config(tau1=INF, tau2=0.0))
    assert computed(flux, "detail") == [0]
    run(flux, H2Config(tau1=INF, tau2=0.0, force_detail_hit=False))
    assert computed(flux, "detail") == list(range(12))
    assert computed(flux) == [0]
    assert "forced" not in {r.outcome for r in h2cache.step_records(flux)}


@pytest.mark.parametrize("name", ["last", "taylor", "newton", "hermite", "dmd"])
def test_memory_is_as_many_residuals_as_the_predictor_says(flux, name):
    from h2cache.predictors import states

    config = H2Config(tau1=0, tau2=0, predictor=name, order=2)
    run(flux, config)
    residual = (16 + 5) * 32 * 4  # joint tokens, width, float32
    references = 16 * 32 * 4 + residual  # pools of 1 at this size
    assert h2cache.summary(flux).bytes_held == 2 * states(name, 2) * residual + references


def test_repaying_comes_closer_under_an_euler_sampler(tiny):
    exact = generate(tiny, steps=50, **SMALL)
    results = []
    for repay in (False, True):
        config = H2Config(tau1=INF, tau2=INF, max_consecutive_hits=5, warmup_steps=4, predictor="taylor")
        h2cache.enable(tiny, replace(config, repay=repay))
        results.append((psnr(generate(tiny, steps=50, **SMALL), exact), h2cache.summary(tiny).block_ratio))
    (plain, ratio), (repaid, ratio_repaid) = results
    assert repaid > plain + 0.5
    assert ratio_repaid == pytest.approx(ratio, rel=0.15)
    assert ratio > 3


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"predictor": "nope"}, "nope"),
        ({"order": 0}, "order"),
        ({"order": 5}, "order"),
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": 1.1}, "sigma"),
        ({"clock": "time"}, "clock"),
    ],
)
def test_what_cannot_be_is_refused(bad, named):
    with pytest.raises(ValueError, match=named):
        H2Config(**bad)


def test_streams_without_text_are_forecast_too():
    from h2cache.predictors import build

    predictor = build("taylor", repay=True)
    for at in (0.0, 1.0):
        predictor.learn(Stream(torch.full((1, 2, 2), at)), at=at)
    assert predictor.predict(3.0).img.unique().item() == 3
    assert predictor.predict(3.0).txt is None
