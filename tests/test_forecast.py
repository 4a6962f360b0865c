"""H2-Cache with a forecast in place of the last residual, and planning ahead."""

import pytest
import torch
from conftest import denoise, generate, make_flux, make_inputs

import h2cache
from h2cache import H2Config
from h2cache.program import Stream

INF = float("inf")
AHEAD = {"ahead": True, "predictor": "taylor"}


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


@pytest.mark.parametrize("predictor", ["taylor", "newton", "secant"])
def test_a_forecast_comes_closer_at_equal_decisions(tiny, predictor):
    """The embedded model, compared at a fixed pattern of hits."""
    exact = generate(tiny, steps=30)
    results = {}
    for name in ("last", predictor):
        config = H2Config(tau1=INF, tau2=INF, max_consecutive_hits=2, warmup_steps=3, predictor=name)
        h2cache.enable(tiny, config)
        results[name] = psnr(generate(tiny, steps=30), exact)
        blocks = h2cache.summary(tiny).blocks_run
        assert results.setdefault("blocks", blocks) == blocks
    assert results[predictor] > results["last"] + 1


@pytest.mark.parametrize("predictor", ["taylor", "newton", "hermite", "taylor_scaled", "dmd", "secant"])
def test_a_batch_decides_and_forecasts_each_sample_alone(tiny, predictor):
    prompts = [
        'a red round sign that says "GO" on a white background',
        'a teal shirt that says "B" on a dotted pink background',
    ]
    config = H2Config(tau1=0.3, tau2=0.2, predictor=predictor, clock="sigma")
    h2cache.enable(tiny, config)
    alone = [generate(tiny, p, steps=14, seed=n) for n, p in enumerate(prompts)]
    h2cache.enable(tiny, config)
    together = generate(tiny, prompts, steps=14)
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


# Planning ahead.


def test_ahead_doubles_its_gaps_where_nothing_is_asked(flux):
    run(flux, H2Config(tau1=INF, tau2=INF, **AHEAD), steps=40)
    assert computed(flux) == computed(flux, "detail") == [0, 2, 6, 14, 30]
    records = [r for r in h2cache.step_records(flux) if r.outcome != "miss"]
    assert all(r.blocks_run == 0 for r in records)  # not even the heads
    assert {(r.stage, r.outcome) for r in records} == {("structure", "hit"), ("detail", "forced")}


@pytest.mark.parametrize("predictor", ["last", "newton", "hermite", "taylor_scaled", "dmd"])
def test_ahead_forecasts_by_any_rule(flux, predictor):
    run(flux, H2Config(tau1=0.2, tau2=0.2, ahead=True, predictor=predictor), steps=20)
    assert 3 < len(computed(flux)) < 20


def test_ahead_stays_within_its_limits(flux):
    config = H2Config(tau1=INF, tau2=INF, max_consecutive_hits=3, warmup_steps=2, last_steps=2, **AHEAD)
    run(flux, config, steps=20)
    assert computed(flux) == [0, 1, 3, 7, 11, 15, 18, 19]


def test_ahead_computes_more_often_where_more_is_asked(tiny):
    counts = []
    for tau in (0.01, 0.03, 0.1):
        h2cache.enable(tiny, H2Config(tau1=tau, tau2=tau, **AHEAD))
        generate(tiny, steps=30)
        counts.append(len(computed(tiny)))
    assert counts[0] > counts[1] > counts[2] > 4
    measures = [r.measure for r in h2cache.step_records(tiny) if r.measure is not None]
    assert len(measures) == 2 * (counts[2] - 2)  # none while fewer than two residuals are known


def test_ahead_measures_the_error_of_its_forecast():
    """A constant network leaves nothing to correct: error 0, and gaps that only double."""
    model = make_flux()
    inputs = make_inputs()
    with torch.no_grad():
        for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
            for p in block.parameters():
                p.zero_()
    h2cache.enable(model, H2Config(tau1=0.01, tau2=0.01, **AHEAD), steps=16)
    denoise(model, steps=16, inputs=inputs)
    assert computed(model)[:4] == [0, 2, 6, 7]  # 0 / 0 is no measure: compute


def test_ahead_keeps_branches_apart(flux):
    config = H2Config(tau1=0.05, tau2=0.05, repay=True, **AHEAD)
    expected = run(flux, config)
    h2cache.enable(flux, config, steps=12)
    interleaved = make_inputs(), make_inputs(seed=5)
    latents = [i.pop("hidden_states") for i in interleaved]
    first = []
    for n in range(12):
        for branch, inputs in enumerate(interleaved):
            call = inputs | {"timestep": torch.full((1,), 1 - n / 12)}
            with torch.no_grad(), flux.cache_context(("cond", "uncond")[branch]):
                out = flux(hidden_states=latents[branch], **call).sample
            latents[branch] = latents[branch] - out / 12
            if branch == 0:
                first.append(out)
    for a, b in zip(expected, first, strict=True):
        assert torch.equal(a, b)


def test_repaying_comes_closer_under_an_euler_sampler(tiny):
    exact = generate(tiny, steps=50)
    results = []
    for repay in (False, True):
        h2cache.enable(tiny, H2Config(tau1=0.03, tau2=0.06, repay=repay, **AHEAD))
        results.append((psnr(generate(tiny, steps=50), exact), h2cache.summary(tiny).block_ratio))
    (plain, ratio), (repaid, ratio_repaid) = results
    assert repaid > plain + 3
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
        ({"predictor": "foca", "reduce": "mean", "clock": "sigma"}, "clock"),
        ({"predictor": "secant", "repay": True}, "repay"),
        ({"ahead": True, "force_detail_hit": False}, "ahead"),
        ({"ahead": True, "adaptive": True}, "ahead"),
        ({"ahead": True, "predictor": "secant"}, "ahead"),
        ({"ahead": True, "predictor": "foca"}, "no weights"),
        ({"ahead": True, "reduce": "mean"}, "ahead"),
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
