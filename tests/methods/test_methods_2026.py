"""The methods of 2026 do what their papers say: schedules, weights, measures; bad settings are refused."""

import json
import math
import random

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from h2cache.baselines.budcache import BudCacheConfig, even, neighbours, proposal, search
from h2cache.baselines.dicache import DiCacheConfig
from h2cache.baselines.easycache import EasyCacheConfig
from h2cache.baselines.meancache import MeanCacheConfig, mean_velocity, released
from h2cache.baselines.seacache import SeaCacheConfig, filtered, grid
from h2cache.baselines.sencache import SenCacheConfig
from h2cache.baselines.spectrum import Fit, SpectrumConfig

import h2cache
from analysis import fit_budcache
from tests.helpers.toys import denoise, generate, make_flux

INF = math.inf
TABLE = {"times": (0.2, 0.9), "by_latents": (1.0, 0.5), "by_time": (2.0, 1.0)}


def computed(target) -> list[int]:
    """The steps at which the last block ran."""
    return [
        r.step for r in h2cache.step_records(target) if r.stage in ("detail", "model") and r.outcome == "miss"
    ]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Settings.


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (SeaCacheConfig, {"threshold": -1.0}, "summed change"),
        (SeaCacheConfig, {"order": 2}, "draws a line"),
        (SeaCacheConfig, {"aspect": 0.0}, "width / height"),
        (EasyCacheConfig, {"threshold": math.nan}, "summed change"),
        (EasyCacheConfig, {"reuse": "input"}, "'difference' or 'output'"),
        (MeanCacheConfig, {"budget": 0}, "always computed"),
        (MeanCacheConfig, {"steps": (1, 2), "orders": (1, 1)}, "begin with step 0"),
        (MeanCacheConfig, {"steps": (0, 2), "orders": (1,)}, "one for each"),
        (MeanCacheConfig, {"steps": (0, 2), "orders": (1, 7)}, "averaged"),
        (MeanCacheConfig, {"checkpoint": "FLUX.1-dev"}, "Z-Image"),
        (SpectrumConfig, {"window": 0.5}, "switches off"),
        (SpectrumConfig, {"mix": 1.5}, "share"),
        (SpectrumConfig, {"ridge": 0.0}, "unknowns"),
        (BudCacheConfig, {"steps": (0, 4, 4)}, "rise"),
        (DiCacheConfig, {"depth": 0}, "one block"),
        (DiCacheConfig, {"error": "delta"}, "'probe' or 'excess'"),
        (SenCacheConfig, {"times": (0.5,)}, "one table"),
        (SenCacheConfig, {"early": 2.0}, "share"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_reason(kind, settings, words):
    with pytest.raises(ValueError, match=words):
        kind(**settings)


def test_sencache_refuses_a_checkpoint_without_a_table():
    with pytest.raises(ValueError, match="fit_sencache"):
        SenCacheConfig().for_checkpoint("FLUX.1-dev")


# SeaCache.


def test_the_filter_keeps_the_mean_and_passes_fine_detail_as_the_noise_falls():
    wave = torch.tensor([1.0, -1.0] * 4).expand(1, 1, 8, 8).contiguous()  # the highest frequency of one axis
    passed = [filtered(wave, level, 3.0).abs().mean().item() for level in (0.99, 0.6, 0.2, 0.01)]
    assert passed == sorted(passed)
    assert passed[0] < 0.1
    assert passed[-1] == pytest.approx(1.0, abs=0.02)  # without noise all frequencies pass alike


def test_tokens_are_filtered_as_the_picture_they_are():
    planes = noise(2, 4, 4, 6)
    tokens = planes.movedim(1, -1).flatten(1, 2)  # (B, 24, C), row by row
    same = filtered(planes, 0.5, 3.0).movedim(1, -1).flatten(1, 2)
    torch.testing.assert_close(filtered(tokens, 0.5, 3.0, aspect=1.5), same)


@pytest.mark.parametrize(
    ("tokens", "aspect", "found"), [(64, 1.0, (8, 8)), (24, 1.5, (4, 6)), (24, 0.67, (6, 4))]
)
def test_tokens_are_laid_out_by_the_aspect(tokens, aspect, found):
    assert grid(tokens, aspect) == found


def test_seacache_computes_after_so_many_hits_in_a_row(flux):
    h2cache.enable(flux, SeaCacheConfig(threshold=INF, max_consecutive_hits=2), steps=8)
    denoise(flux, steps=8)
    assert computed(flux) == [0, 3, 6, 7]


# EasyCache.


def test_easycache_runs_on_a_model_without_an_engine():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(32,), layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ).eval()  # fmt: skip
    h2cache.enable(unet, EasyCacheConfig(threshold=INF, warmup_steps=2), steps=6)
    x, outputs = noise(1, 3, 8, 8), []
    with torch.no_grad():
        for n in range(6):
            outputs.append((x + n, unet(x + n, torch.tensor(900.0 - 100 * n)).sample))
    assert computed(unet) == [0, 1, 5]
    (x1, v1), (x3, v3) = outputs[1], outputs[3]
    torch.testing.assert_close(v3, x3 + (v1 - x1))


def test_easycache_in_a_batch_keeps_what_each_picture_would_have_alone(tiny):
    prompts = ['a red round sign that says "CAFE" on a green background', 'a blue oval badge that says "Q"']
    hits = []
    for threshold in (0.05, 0.2):
        h2cache.enable(tiny, EasyCacheConfig(threshold=threshold, warmup_steps=2))
        both = generate(tiny, prompts, steps=10, seed=5)
        for n, prompt in enumerate(prompts):
            alone = generate(tiny, prompt, steps=10, seed=5 + n)[0]
            hits.append(10 - len(computed(tiny)))
            assert (both[n] - alone).norm() <= 1e-4 * alone.norm()
    assert any(hits)


# BudCache.


def test_the_search_is_a_command_and_its_result_is_taken(monkeypatch, tmp_path, capsys):
    table = tmp_path / "budcache.json"
    table.write_text("{}")
    monkeypatch.setattr(fit_budcache, "CONSTANTS", table)
    asked = ["--budgets", "3", "--trials", "4", "--steps", "8", "--limit", "1", "--save"]
    assert fit_budcache.main(asked) == 0
    found = json.loads(table.read_text())["tiny_flux"]
    assert json.loads(capsys.readouterr().out) == found
    assert found["steps"] == 8
    assert found["computed"]["3"][0] == 0
    assert len({*found["computed"]["3"]}) == 3
    assert "after 4 trials" in found["source"]
    assert fit_budcache.main([*asked, "--budgets", "8"]) == 2
    assert "--budgets 8" in capsys.readouterr().err


def test_the_search_is_among_all_evaluations_of_a_sampler(capsys):
    asked = ["--budgets", "10", "--trials", "1", "--steps", "6", "--limit", "1", "--sampler", "heun"]
    assert fit_budcache.main(asked) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 2 * 6 - 1
    assert len({*found["computed"]["10"]}) == 10


# MeanCache.


def test_the_mean_velocity_is_exact_where_the_velocity_is_a_line():
    """The slope from the beginning of an interval to its mean is half of the line's, over half of the way."""
    lengths, values = [0.1, 0.1, 0.1], [1.0, 1.1, 1.2]
    u = sum(values) / 3
    expected = values[-1] - 0.1 * (values[0] - u) / 0.3
    found = sum(w * v for w, v in zip(mean_velocity(lengths, 0.1), values, strict=True))
    assert found == pytest.approx(expected)
    assert sum(mean_velocity([0.3, 0.1, 0.2], 0.4)) == pytest.approx(1.0)  # a constant is kept
    assert mean_velocity([0.3], 0.2) == [1.0]  # plain reuse


@pytest.mark.parametrize("model", ["Z-Image", "Qwen-Image", "Qwen-Image-2512"])
def test_released_schedules_are_taken_as_they_are(model):
    for budget, wanted in released()[model]["schedules"].items():
        config = MeanCacheConfig(budget=int(budget)).for_checkpoint(model)
        schedule = config.schedule(50)
        assert [n for n, order in enumerate(schedule) if order == 0] == wanted["computed"]


@pytest.mark.parametrize(("total", "budget"), [(50, 7), (50, 10), (28, 10), (8, 5), (5, 5), (30, 99), (9, 1)])
def test_other_budgets_are_kept_exactly(total, budget):
    schedule = MeanCacheConfig(budget=budget).schedule(total)
    assert schedule.count(0) == min(budget, total)
    assert schedule[0] == 0


def test_meancache_runs_its_own_steps(tiny):
    h2cache.enable(tiny, MeanCacheConfig(steps=(0, 1, 4, 6), orders=(1, 2, 2, 1)))
    generate(tiny, steps=8)
    assert computed(tiny) == [0, 1, 4, 6]


# Spectrum.


def test_the_window_grows_as_published():
    assert SpectrumConfig().schedule(50).count(True) == 14
    assert SpectrumConfig(growth=3.0).schedule(50).count(True) == 10
    assert all(SpectrumConfig(window=1.0, growth=0.0).schedule(50))


def test_running_sums_give_the_ridge_regression():
    times, values = [0, 1, 2, 3, 4, 6, 8, 11], noise(8, 1, 5, 3)
    fit = Fit(order=4, ridge=0.1, total=50)
    for time, value in zip(times, values, strict=True):
        fit.learn(value, float(time))
    x = np.polynomial.chebyshev.chebvander(2 * np.array(times) / 50 - 1, 4)
    coefficients = np.linalg.solve(x.T @ x + 0.1 * np.eye(5), x.T @ values.reshape(8, -1).double().numpy())
    expected = np.polynomial.chebyshev.chebvander(2 * 13 / 50 - 1, 4) @ coefficients
    torch.testing.assert_close(
        fit.predict(13.0, mix=1.0).flatten().double(), torch.tensor(expected).flatten(), rtol=1e-4, atol=1e-4
    )
    line = values[-1] + 2 / 3 * (values[-1] - values[-2])
    torch.testing.assert_close(fit.predict(13.0, mix=0.0), line)


# BudCache.


def test_the_even_rule_fixes_a_quarter_and_keeps_the_budget():
    for total, budget in ((50, 10), (28, 6), (5, 5), (4, 1)):
        steps = even(total, budget)
        assert len(set(steps)) == budget
        assert steps[: max(1, budget // 4)] == tuple(range(max(1, budget // 4)))
        assert steps[-1] < total


def test_moves_keep_the_budget_and_the_fixed_steps():
    chance, steps = random.Random(0), (0, 1, 5, 9, 12, 17, 20, 26)
    tried = [proposal(steps, 28, chance) for _ in range(200)] + neighbours(steps, 28, chance)
    for other in tried:
        assert len(other) == len(set(other)) == 8
        assert other[:2] == (0, 1)
        assert len({*other} - {*steps}) in (1, 2)
    near = {5 + n for n in (-3, -2, -1, 1, 2, 3)} - {*steps}
    assert {min({*o} - {*steps}) for o in neighbours(steps, 28, chance) if 5 not in o} >= near


def test_the_search_finds_the_least_of_a_simple_loss_and_asks_once_for_each():
    best, asked = (0, 1, 7, 14, 21, 27), []

    def loss(steps):
        asked.append(steps)
        return sum(abs(a - b) for a, b in zip(steps, (0, 7, 10, 14, 21, 27), strict=True)) / 100

    found = list(search(loss, 28, len(best), random.Random(0)))
    assert found[-1] == ((0, 7, 10, 14, 21, 27), 0.0)
    assert len(asked) == len(set(asked))
    assert [value for _, value in found] == sorted((value for _, value in found), reverse=True)


def test_budcache_computes_exactly_its_steps(flux):
    h2cache.enable(flux, BudCacheConfig(budget=4), steps=9)
    denoise(flux, steps=9)
    assert computed(flux) == list(even(9, 4))


# DiCache.


def test_dicache_goes_on_from_its_probe_and_computes_the_first_and_the_last_steps():
    model = make_flux()
    h2cache.enable(model, DiCacheConfig(threshold=INF, retention=0.2, depth=2), steps=10)
    denoise(model, steps=10)
    assert computed(model) == [0, 1, 2, 9]
    run = [sum(r.blocks_run for r in h2cache.step_records(model) if r.step == n) for n in range(10)]
    assert run == [7, 7, 7, *[2] * 6, 7]


# SenCache.


def test_sencache_is_tighter_at_first_and_limits_hits_in_a_row(flux):
    config = SenCacheConfig(threshold=INF, early_threshold=0.0, early=0.3, max_consecutive_hits=3, **TABLE)
    h2cache.enable(flux, config, steps=10)
    denoise(flux, steps=10)
    assert computed(flux) == [0, 1, 2, 6]


def test_sencache_looks_its_table_up_at_the_last_computed_step():
    method = SenCacheConfig(**TABLE).build()
    assert method.expected(0.25, moved=0.1, passed=0.2) == pytest.approx(1.0 * 0.1 + 2.0 * 0.2)
    assert method.expected(0.8, moved=0.1, passed=0.2) == pytest.approx(0.5 * 0.1 + 1.0 * 0.2)
