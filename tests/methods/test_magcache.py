"""MagCache: its schedule is a pure function of a table."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from h2cache.baselines.magcache import MagCacheConfig, resample
from hypothesis import given
from hypothesis import strategies as st

import h2cache
from analysis import fit_magcache
from h2cache.predictors import LastResidual
from tests.helpers.toys import denoise, make_inputs

INF = float("inf")
ONES = (1.0,) * 28


def computed(config: MagCacheConfig, total: int = 28, **kwargs) -> list[int]:
    return [step for step, full in enumerate(config.schedule(total, **kwargs)) if full]


@given(st.integers(2, 60), st.integers(1, 120))
def test_resampling_keeps_both_ends_and_its_own_length(length, total):
    table = tuple(float(n) for n in range(length))
    out = resample(table, total)
    assert len(out) == total
    assert out[0] == 0
    if total > 1:
        assert out[-1] == length - 1
    assert out == sorted(out)
    assert resample(table, length) == list(table)


def test_ratios_of_one_skip_as_often_as_allowed():
    config = MagCacheConfig(ratios=ONES, max_consecutive_hits=4, retention=0.1)
    assert computed(config) == [0, 1, 2, 7, 12, 17, 22, 27]


@pytest.mark.parametrize("off", [{"threshold": 0.0}, {"max_consecutive_hits": 0}])
@pytest.mark.parametrize("ratios", [ONES, (1.0, 0.9, 1.1, 0.95)])
def test_switched_off_computes_every_step(off, ratios):
    assert computed(MagCacheConfig(ratios=ratios, **off)) == list(range(28))


def test_drift_adds_up_to_the_threshold():
    """Ratio 0.9: 1 - 0.9, then + 1 - 0.81, then + 1 - 0.729: 0.1, 0.29, 0.561."""
    config = MagCacheConfig(ratios=(1.0, *[0.9] * 9), threshold=0.3, max_consecutive_hits=9, retention=0.1)
    assert computed(config, 10) == [0, 3, 6, 9]
    wider = MagCacheConfig(ratios=(1.0, *[0.9] * 9), threshold=0.57, max_consecutive_hits=9, retention=0.1)
    assert computed(wider, 10) == [0, 4, 8]


def test_outliers_of_the_table_are_computed_at_any_number_of_steps():
    config = MagCacheConfig(ratios=ONES, always_compute=(11,), threshold=9, max_consecutive_hits=99)
    assert computed(config) == [0, 1, 2, 11]
    steps = computed(config, 50)
    assert steps[:5] == [0, 1, 2, 3, 4]
    assert [round(s * 27 / 49) for s in steps[5:]] == [11] * len(steps[5:])


def test_the_authors_setting_for_flux_dev():
    """28 steps, threshold 0.24, K 5: about 2.8x in their measurement."""
    config = MagCacheConfig().for_checkpoint("FLUX.1-dev")
    steps = computed(config)
    assert {0, 1, 2, 11} <= set(steps)
    assert 28 / len(steps) > 2.3
    assert config.schedule(28) == config.schedule(28)


def test_branches_have_tables_of_their_own():
    config = MagCacheConfig().for_checkpoint("Qwen-Image")
    assert len(config.ratios) == len(config.ratios_uncond) == 50
    apart = MagCacheConfig(ratios=ONES, ratios_uncond=(1.0, *[0.5] * 27))
    assert computed(apart, uncond=True) != computed(apart)


def test_an_unknown_checkpoint_is_refused_with_the_command(flux):
    with pytest.raises(ValueError, match=r"no constants.*analysis\.fit_magcache"):
        h2cache.enable(flux, MagCacheConfig(), steps=6)


def test_the_whole_stack_is_skipped_and_one_image_tensor_kept(flux):
    h2cache.enable(flux, MagCacheConfig(ratios=(1.0, 1.0), retention=0.0, max_consecutive_hits=3), steps=8)
    denoise(flux, steps=8)
    per_step = [sum(r.blocks_run for r in h2cache.step_records(flux) if r.step == s) for s in range(8)]
    assert per_step == [7, 0, 0, 0, 7, 0, 0, 0]
    assert h2cache.summary(flux).bytes_held == 16 * 32 * 4


def test_the_stored_residual_is_that_of_the_computed_step(flux, monkeypatch):
    learnt = []
    own = LastResidual.learn
    monkeypatch.setattr(LastResidual, "learn", lambda self, r, **k: learnt.append(r) or own(self, r, **k))
    h2cache.enable(flux, MagCacheConfig(ratios=(1.0, 1.0), retention=0.0, max_consecutive_hits=3), steps=8)
    denoise(flux, steps=8, inputs=make_inputs())
    assert len(learnt) == 2
    assert not torch.equal(learnt[0].img, learnt[1].img)


def test_ratios_are_fitted_and_saved(tmp_path, monkeypatch, capsys):
    table = tmp_path / "magcache.json"
    table.write_text('{"other": {"ratios": [1.0, 1.0]}}')
    monkeypatch.setattr(fit_magcache, "CONSTANTS", table)
    monkeypatch.setattr(sys, "argv", ["fit", "--limit", "2", "--steps", "6", "--save"])
    assert fit_magcache.main() == 0
    saved = json.loads(table.read_text())
    assert saved["other"] == {"ratios": [1.0, 1.0]}
    ratios = saved["tiny_flux"]["ratios"]
    assert len(ratios) == 6
    assert ratios[0] == 1.0
    assert all(0.5 < r < 2 for r in ratios)
    assert "6 steps, 2 prompts" in saved["tiny_flux"]["source"]
    monkeypatch.setattr(sys, "argv", ["fit", "--model", str(tmp_path)])
    assert fit_magcache.main() == 2
    assert "model_index.json" in capsys.readouterr().err


def test_the_spread_is_over_prompts_within_a_branch():
    """Points are (branch, step, ratio, deviation over tokens, cosine distance)."""
    apart = [("call 0", 1, 1.0, 0.0, 0.0), ("call 1", 1, 2.0, 0.0, 0.0)]
    found = fit_magcache.fit(apart * 2)
    assert found["ratios"] == [1.0, 1.5]
    assert found["largest_deviation_over_prompts"] == 0
    assert found["averaged_branches"] == ["call 0", "call 1"]
    named = [("cond", 1, 1.0, 0.0, 0.0), ("cond", 1, 3.0, 0.0, 0.0), ("uncond", 1, 2.0, 0.0, 0.0)]
    found = fit_magcache.fit(named)
    assert (found["ratios"], found["ratios_uncond"]) == ([1.0, 2.0], [1.0, 2.0])
    assert found["largest_deviation_over_prompts"] == 1  # of the first branch, not the last
    assert "averaged_branches" not in found


def test_the_source_counts_the_prompts_there_are(tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "p.txt"
    prompts.write_text('a red round sign that says "GO" on a white background\n')
    assert fit_magcache.main(["--prompts", str(prompts), "--steps", "3"]) == 0
    assert "3 steps, 1 prompts" in json.loads(capsys.readouterr().out)["source"]


def test_the_embedded_models_table_says_where_it_comes_from():
    table = json.loads(Path("baselines/constants/magcache.json").read_text())
    assert all("source" in entry for entry in table.values())
    assert len(table["tiny_flux"]["ratios"]) == 50


def test_the_schedule_is_worked_out_once_a_request(flux, monkeypatch):
    made, own = [], MagCacheConfig.schedule
    monkeypatch.setattr(MagCacheConfig, "schedule", lambda *a, **k: made.append(1) or own(*a, **k))
    config = MagCacheConfig(threshold=9.0, ratios=(1.0, 1.0), retention=0.0, max_consecutive_hits=3)
    h2cache.enable(flux, config, steps=8)
    denoise(flux, steps=8)
    assert len(made) == 1


@pytest.mark.parametrize(("total", "cond", "uncond"), [(24, 5, 4), (28, 6, 5), (50, 10, 10)])
def test_with_two_branches_the_retained_calls_are_counted(total, cond, uncond):
    """int(2 * steps * 0.2) calls, the branch with the prompt first."""
    config = MagCacheConfig(
        ratios=ONES, ratios_uncond=ONES, retention=0.2, round_retention=False, max_consecutive_hits=99
    )
    assert computed(config, total) == list(range(cond))
    assert computed(config, total, uncond=True) == list(range(uncond))


@pytest.mark.parametrize("total", [71, 75, 99])
def test_ties_are_rounded_as_numpy_does_with_the_factor_first(total):
    table = tuple(float(n) for n in range(50))
    assert resample(table, total) == np.round(np.arange(total) * ((50 - 1) / (total - 1))).tolist()
