"""SpeCa and ClusCa against their specifications."""

import math
from dataclasses import replace

import pytest
import torch
from h2cache.baselines.clusca import ClusCaConfig, Clusters, cluster, pick
from h2cache.baselines.hicache import HiCacheConfig
from h2cache.baselines.speca import Draft, SpeCaConfig, error_of
from h2cache.baselines.taylorseer import TaylorSeerConfig

import h2cache
from tests.helpers.inside import memory_of
from tests.helpers.toys import denoise, generate, make_inputs

INF = float("inf")


def run(model, config, steps=12, **extra):
    h2cache.enable(model, config, steps=steps)
    return denoise(model, steps=steps, **extra)


def computed(model) -> list[int]:
    return [r.step for r in h2cache.step_records(model) if r.stage == "structure" and r.outcome == "miss"]


def outcomes(config: SpeCaConfig, error: float | None, total: int = 50) -> list[int]:
    draft, full = Draft(), []
    for step in range(total):
        now, checked = draft.decide(step, total, config)
        assert not (now and checked)
        if now:
            full.append(step)
        if checked:
            draft.error = error
    return full


@pytest.mark.parametrize(
    ("settings", "never", "always"),
    [
        ({}, [0, 2, 11, 20, 29, 38, 47], [0, 2, 6, 10]),
        ({"min_drafts": 4, "max_drafts": 12, "warmup_steps": 1}, [0, 13, 26, 39], [0, 6, 12]),
        ({"min_drafts": 3, "max_drafts": 8}, [0, 2, 11, 20, 29, 38, 47], [0, 2, 7, 12]),
    ],
)
def test_speca_drafts_as_in_the_table(settings, never, always):
    config = SpeCaConfig(**settings)
    assert outcomes(config, 0.0) == never
    rejected = outcomes(config, INF)
    assert rejected[: len(always)] == always
    assert outcomes(config, math.nan) == rejected  # no measure, no trust
    assert len(rejected) == {2: 13, 4: 9, 3: 11}[config.min_drafts]


@pytest.mark.parametrize("steps", range(5, 13))
def test_speca_announces_the_error_that_it_keeps_from_a_check_to_the_next_step(flux, steps):
    """Wherever a run ends, and with a full history (order 0) too."""
    run(flux, SpeCaConfig(order=0, base=0.01), steps)
    summary = h2cache.summary(flux)
    assert summary.bytes_held <= summary.bytes_needed


def test_speca_alternates_with_one_draft_and_its_tolerance_falls_to_the_floor():
    assert outcomes(SpeCaConfig(max_drafts=1, warmup_steps=1), 0.0, 10) == [0, 2, 4, 6, 8]
    config = SpeCaConfig(base=1.0, decay=0.01, floor=0.1)
    assert config.tolerance(0, 50) == 1
    assert config.tolerance(49, 50) == 0.1


# SpeCa.


def test_speca_counts_blocks_of_each_kind_of_step(flux):
    run(flux, SpeCaConfig(base=INF, floor=INF, max_drafts=4), steps=10)
    per_step = [sum(r.blocks_run for r in h2cache.step_records(flux) if r.step == s) for s in range(10)]
    assert per_step == [7, 0, 7, 0, 0, 1, 1, 7, 0, 0]


@pytest.mark.parametrize("granularity", ["module", "stage"])
def test_speca_rejects_after_a_failed_check(flux, granularity):
    config = SpeCaConfig(base=0.0, floor=0.0, granularity=granularity)
    run(flux, config, steps=12)
    assert computed(flux) == [0, 2, 6, 10]
    assert h2cache.summary(flux).blocks_run == 4 * 7 + 2


@pytest.mark.parametrize("granularity", ["module", "stage"])
def test_images_of_a_batch_draft_each_for_itself(tiny, granularity):
    """The two part company: computed at other steps, together they are what each is alone."""
    prompts = ['a red round sign that says "CAFE" on a green background', 'a blue oval badge that says "Q"']
    loose = {"base": 0.05, "decay": 1.0, "floor": 0.0, "min_drafts": 1, "measure": "norm"}
    config = SpeCaConfig(granularity=granularity, **loose)
    h2cache.enable(tiny, config)
    both, steps = generate(tiny, prompts, steps=28, seed=5), [computed(tiny)]
    alone = []
    for n, prompt in enumerate(prompts):
        alone.append(generate(tiny, prompt, steps=28, seed=5 + n)[0])
        steps.append(computed(tiny))
    assert steps[1] != steps[2]
    assert set(steps[0]) == {*steps[1], *steps[2]}
    for a, b in zip(both, alone, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()
    h2cache.enable(tiny, replace(config, reduce="mean"))
    assert (generate(tiny, prompts, steps=28, seed=5)[1] - alone[1]).norm() > 1e-3 * alone[1].norm()
    assert computed(tiny) != steps[0]


def test_the_error_is_taken_in_float32():
    draft, real = torch.full((1, 4), 2.0, dtype=torch.bfloat16), torch.full((1, 4), 1.0, dtype=torch.bfloat16)
    assert error_of(draft, real, "element").item() == pytest.approx(1)
    assert error_of(draft, real, "norm").item() == pytest.approx(1)
    assert math.isfinite(error_of(draft, torch.zeros_like(real), "element").item())


# ClusCa.


def test_planted_clusters_are_found():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 8, generator=g) * 0.1
    x[:, 25:] += 5
    labels, centres = cluster(x, x[:, [0, 1]].clone())  # both centres start in the same clump
    assert all(len(set(labels[b, :25].tolist())) == len(set(labels[b, 25:].tolist())) == 1 for b in range(2))
    assert (labels[:, 0] != labels[:, -1]).all()
    assert centres.dtype == torch.float32


def test_empty_clusters_do_no_harm():
    x = torch.ones(1, 6, 4)  # all tokens alike: all clusters but one stay empty
    labels, centres = cluster(x, x[:, :3].clone())
    assert labels.unique().numel() == 1
    assert centres.isfinite().all()
    assert pick(labels, 3, torch.Generator().manual_seed(0)).max() < 6


def test_members_are_picked_uniformly():
    labels = torch.tensor([[0, 0, 0, 0, 1, 1]])
    g = torch.Generator().manual_seed(0)
    picked = torch.cat([pick(labels, 2, g) for _ in range(600)])
    counts = torch.bincount(picked[:, 0], minlength=6)
    assert counts[4:].sum() == 0
    assert all(100 < n < 200 for n in counts[:4].tolist())
    assert set(picked[:, 1].tolist()) == {4, 5}


def test_without_clusters_it_is_taylorseer(flux):
    taylor = run(flux, TaylorSeerConfig(interval=4))
    assert all(map(torch.equal, taylor, run(flux, ClusCaConfig(interval=4, clusters=0))))
    hermite = run(flux, HiCacheConfig(interval=4, order=1))
    assert all(map(torch.equal, hermite, run(flux, ClusCaConfig(interval=4, clusters=0, basis="hermite"))))


def test_as_many_clusters_as_tokens_computes_the_whole_mlp(flux):
    seen, inputs = [], make_inputs()
    config = ClusCaConfig(interval=4, clusters=1000, gamma=0.0, exact_fresh=True)
    h2cache.enable(flux, config, steps=8)
    denoise(flux, 3, inputs=inputs)
    module = flux.transformer_blocks[1].ff
    own = module.forward
    module.forward = lambda x: seen.append((x, own(x))) or seen[-1][1]
    with torch.no_grad(), flux.cache_context("cond"):
        flux(**inputs | {"timestep": torch.full((1,), 0.1)})
    assert computed(flux) == [0, 1, 2]
    h2cache.disable(flux)
    [(x, out)] = seen
    with torch.no_grad():
        assert torch.allclose(out, type(module).forward(module, x), atol=1e-5)


def test_only_the_picked_rows_are_touched(flux):
    touched, inputs = [], make_inputs()
    h2cache.enable(flux, ClusCaConfig(interval=4, clusters=4, gamma=0.0, order=0), steps=8)
    denoise(flux, 3, inputs=inputs)
    module = flux.transformer_blocks[0].ff
    own = module.forward
    module.forward = lambda x: touched.append(own(x)) or touched[-1]
    before = memory_of(flux).state("modules", dict).outputs[0, "ff"][-1][0]
    with torch.no_grad(), flux.cache_context("cond"):
        flux(**inputs | {"timestep": torch.full((1,), 0.1)})
    rows = (touched[0] != before).any(-1).sum(-1)
    assert rows.tolist() == [4]


def test_labels_hold_between_computed_steps(flux, monkeypatch):
    updates, own = [], Clusters.update
    monkeypatch.setattr(Clusters, "update", lambda self, *a: updates.append(own(self, *a)))
    run(flux, ClusCaConfig(interval=4, clusters=3))
    assert len(updates) == len(computed(flux)) == 5


def test_seed_and_anchor_decide_the_image(flux):
    first = run(flux, ClusCaConfig(interval=4, clusters=3))
    assert all(map(torch.equal, first, run(flux, ClusCaConfig(interval=4, clusters=3))))
    for other in ({"seed": 1}, {"anchor": True}):
        assert not torch.equal(first[-1], run(flux, ClusCaConfig(interval=4, clusters=3, **other))[-1])
