"""What the methods' specifications ask for, on what the modules and predictors really give."""

import math

import numpy as np
import pytest
import torch
from h2cache.baselines import speca
from h2cache.baselines.clusca import ClusCaConfig
from h2cache.baselines.magcache import MagCacheConfig
from h2cache.baselines.speca import SpeCaConfig, error_of
from h2cache.baselines.taylorseer import TaylorSeerConfig
from h2cache.baselines.teacache import TeaCacheConfig

import h2cache
from h2cache import weights
from h2cache.predictors import build
from h2cache.program import Stream
from tests.helpers.curves import exponentials
from tests.helpers.inside import memory_of
from tests.helpers.toys import denoise, make_inputs

INF = math.inf


def stream(seed: int) -> Stream:
    return Stream(torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def outputs(flux):
    """A module's forward that notes its outputs, put before what a method does to it."""

    def watch(module) -> list:
        seen, before = [], module.forward
        module.forward = lambda *args: seen.append(before(*args)) or seen[-1]
        return seen

    return watch


# TaylorSeer, SpeCa, ClusCa.


def test_taylorseer_of_order_0_is_plain_reuse(flux, outputs):
    h2cache.enable(flux, TaylorSeerConfig(interval=3, order=0, warmup_steps=1))
    seen = outputs(flux.transformer_blocks[1].ff)
    denoise(flux, 6)
    assert all(torch.equal(seen[n], seen[3 * (n // 3)]) for n in range(6))
    assert not torch.equal(seen[0], seen[3])


def test_speca_compares_the_draft_in_use_with_the_block_on_the_same_input(flux, monkeypatch):
    pairs, used, inputs = [], [], []
    last = flux.single_transformer_blocks[-1].proj_out
    monkeypatch.setattr(speca, "error_of", lambda g, r, *how: pairs.append((g, r)) or error_of(g, r, *how))
    h2cache.enable(flux, SpeCaConfig(base=INF, floor=INF, min_drafts=1, warmup_steps=1), steps=3)
    last.register_forward_hook(lambda m, args, out: inputs.append(args[0]) or used.append(out))
    denoise(flux, 3)
    ((draft, real),) = pairs
    assert torch.equal(draft, used[2])
    assert torch.equal(real, torch.nn.Linear.forward(last, inputs[2]))
    assert not torch.equal(draft, real)


@pytest.mark.parametrize("anchor", [True, False])
def test_clusca_replaces_a_token_of_each_cluster_and_keeps_the_slope(flux, outputs, anchor):
    config = ClusCaConfig(interval=6, clusters=4, gamma=0.0, anchor=anchor)
    h2cache.enable(flux, config, steps=8)
    seen = outputs(flux.transformer_blocks[0].ff)
    denoise(flux, 6)
    slope, newest = seen[2] - seen[1], seen[2]
    for x, out in enumerate(seen[3:], start=1):
        base = out - slope * x
        assert ((base - newest).abs() > 1e-5).any(-1).sum() <= 4
        newest = base


def test_clusca_without_an_anchor_takes_the_next_difference_against_the_corrected(flux):
    drawn = {}
    for anchor in (True, False):
        h2cache.enable(flux, ClusCaConfig(interval=3, clusters=4, anchor=anchor), steps=9)
        drawn[anchor] = denoise(flux, 8)
    same = [torch.equal(a, b) for a, b in zip(drawn[True], drawn[False], strict=True)]
    assert same == [True] * 6 + [False] * 2  # computed: 0, 1, 2 and 5; the slope of 6 and 7 is another


def test_clusca_blends_each_image_token_with_its_clusters_fresh_one(flux):
    h2cache.enable(flux, ClusCaConfig(interval=4, clusters=4, gamma=0.25, order=0), steps=8)
    inputs = make_inputs(batch=2)
    denoise(flux, 3, inputs=inputs)
    old = memory_of(flux).state("modules", dict).outputs[0, "ff"][-1][0]
    labels = memory_of(flux).state("clusters", dict).labels
    module, seen = flux.transformer_blocks[0].ff, []
    before = module.forward
    module.forward = lambda x: seen.append((x, before(x))) or seen[-1][1]
    with torch.no_grad(), flux.cache_context("cond"):
        flux(**inputs | {"timestep": torch.full((2,), 0.1)})
    (x, out), *_ = seen
    h2cache.disable(flux)
    with torch.no_grad():
        real = before(x)  # outside of a cached call the module's own
    for b in range(2):
        for cluster in labels[b].unique():
            members = (labels[b] == cluster).nonzero()[:, 0]
            fitting = 0
            for pick in members:
                base = old[b].clone()
                base[pick] = real[b, pick]
                expected = torch.lerp(base[members], real[b, pick].expand(len(members), -1), 0.25)
                fitting += torch.allclose(out[b, members], expected, atol=1e-5)
            assert fitting == 1


# TeaCache, MagCache.


def test_teacache_keeps_no_text(flux):
    h2cache.enable(flux, TeaCacheConfig(coefficients=(0.0, 0.0, 0.0, 1.0, 0.0)), steps=4)
    denoise(flux, 4)
    assert h2cache.summary(flux).bytes_held == 2 * 16 * 32 * 4


def test_magcache_that_may_skip_nothing_is_bit_identical(flux):
    expected = denoise(flux)
    h2cache.enable(flux, MagCacheConfig(ratios=(1.0, 0.9), max_consecutive_hits=0), steps=6)
    assert all(map(torch.equal, expected, denoise(flux)))


def test_magcache_takes_the_authors_setting_of_a_checkpoint_where_none_is_given():
    flux, qwen = (MagCacheConfig().for_checkpoint(name) for name in ("FLUX.1-dev", "Qwen-Image"))
    assert (flux.threshold, flux.max_consecutive_hits, flux.retention) == (0.24, 5, 0.1)
    assert (qwen.threshold, qwen.max_consecutive_hits, qwen.retention) == (0.06, 2, 0.2)
    given = MagCacheConfig(threshold=0.24, retention=0.3).for_checkpoint("Qwen-Image")
    assert (given.threshold, given.max_consecutive_hits, given.retention) == (0.24, 2, 0.3)
    video = MagCacheConfig(threshold=INF, max_consecutive_hits=99).for_checkpoint("HunyuanVideo")
    assert sum(video.schedule(28)) == 5  # 0.2 * 28 = 5.6, cut and not rounded


# DMD.


def test_samples_that_learn_at_other_steps_are_as_they_are_alone():
    """Sample 0 learns at every time, sample 1 keeps what it has at some."""
    times, kept = [0.0, 1.0, 4.0, 6.0, 9.0], [False, False, True, False, True]
    both, alone = build("dmd"), [build("dmd"), build("dmd")]
    for n, (at, keeps) in enumerate(zip(times, kept, strict=True)):
        r = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(n))
        both.learn(Stream(r), at, [False, keeps] if keeps else ())
        alone[0].learn(Stream(r[:1]), at=at)
        if not keeps:
            alone[1].learn(Stream(r[1:]), at=at)
        answer = both.predict(at + 2).img
        for sample in range(2):
            assert torch.allclose(answer[sample], alone[sample].predict(at + 2).img[0], atol=1e-5)


def test_dmd_is_exact_on_exponentials_and_lines_and_constants():
    for modes in [(0.9,), (0.97, 1.02), (0.95 * np.exp(0.3j),), (1.0, 0.98 * np.exp(0.2j))]:
        for gap in (1, 3):
            count = max(4, 1 + sum(1 + bool(np.iscomplex(m)) for m in modes))
            times = [float(gap * n) for n in range(count)]
            curve = exponentials(times, *modes)
            for x in (1, 2, 3):
                row, _ = weights.dmd(times, times[-1] + x, curve.T @ curve)
                truth = exponentials([times[-1] + x], *modes)[:, 0]
                assert np.linalg.norm(curve @ row - truth) < 1e-9 * np.linalg.norm(truth)
    assert weights.dmd([0.0, 1.0, 2.0], 4.0, np.eye(3)) == ([0.0, -2.0, 3.0], "taylor")
    for m in (4, 5, 6):
        row, _ = weights.dmd([float(n) for n in range(m)], m + 2.0, np.ones((m, m)))
        assert abs(math.fsum(row) - 1) < 1e-12


@pytest.mark.parametrize("bad", [3, 5])
def test_a_residual_that_is_not_finite_means_reuse(bad):
    modes = build("dmd")
    for at in range(6):
        r = stream(at)
        if at == bad:
            r.img[0, 0, 0] = math.nan
        modes.learn(r, at=float(at))
    assert torch.equal(modes.predict(7.0).img.nan_to_num(), r.img.nan_to_num())
    assert modes.answers == {"reuse": 1}


def test_permuting_the_elements_permutes_the_forecast():
    curve = torch.randn(5, 1, 6, 4, generator=torch.Generator().manual_seed(0)).cumsum(0)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    plain, permuted = build("dmd"), build("dmd")
    for at, r in enumerate(curve):
        plain.learn(Stream(r), at=float(at))
        permuted.learn(Stream(r[:, order]), at=float(at))
    assert torch.allclose(plain.predict(6.0).img[:, order], permuted.predict(6.0).img, atol=1e-5)


def test_learning_costs_dmd_no_wait(monkeypatch):
    waits, own = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: waits.append(1) or own(self))
    modes = build("dmd")
    for at in range(5):
        modes.learn(stream(at), at=float(at))
    assert not waits
    modes.predict(5.0)
    modes.predict(6.0)
    assert len(waits) == 1
