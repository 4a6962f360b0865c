"""Forecasts of single modules, on models whose blocks all have attention and mlp apart."""

from functools import partial

import pytest
import torch
from h2cache.baselines import speca
from h2cache.baselines.clusca import ClusCaConfig
from h2cache.baselines.hicache import HiCacheConfig
from h2cache.baselines.speca import SpeCaConfig, error_of
from h2cache.baselines.taylorseer import TaylorSeerConfig

import h2cache
from analysis.tiny_families import FAMILIES
from tests.helpers.families import STEPS, recorded

COMPUTED = (0, 2, 4)  # of 5 steps, with interval 2 after one warm-up step
PARTS = {"dit": ("attn1", "ff"), "qwen_image_edit": ("attn", "img_mlp")}


def by_hand(case, parts: tuple[str, str]) -> list[torch.Tensor]:
    """The authors' rule for order 1, written down anew: what a module gave, plus its slope in the step."""
    calls, handles, number = [0], [], case.branches
    for block in case.transformers[0].transformer_blocks:
        for module in (getattr(block, part) for part in parts):
            seen: dict[int, list] = {}

            def forecast(module, args, output, seen):
                step, branch = divmod(calls[0], number)
                image = output[0] if isinstance(output, tuple) else output
                known = seen.setdefault(branch, [])
                if step in COMPUTED:
                    known.append((step, image))
                    return output
                (_, newest), slope = known[-1], 0.0
                if len(known) > 1:
                    (before, old), (last, new) = known[-2:]
                    slope = (new - old) / (last - before) * (step - last)
                image = newest + slope
                return (image, *output[1:]) if isinstance(output, tuple) else image

            handles.append(module.register_forward_hook(partial(forecast, seen=seen)))
    model = case.transformers[0]
    handles.append(model.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1)))
    try:
        return case.run()
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", PARTS)
def test_taylorseer_continues_every_attention_and_mlp(family):
    case = recorded(family)
    expected = by_hand(case, PARTS[family])
    h2cache.enable(case.target, TaylorSeerConfig(interval=2, warmup_steps=1))
    found = case.run()
    records = h2cache.step_records(case.target)
    h2cache.disable(case.target)
    assert {r.step for r in records if r.outcome == "miss"} == set(COMPUTED)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert not torch.allclose(found[-case.branches - 1], case.uncached()[-case.branches - 1], atol=1e-4)


@pytest.mark.parametrize("family", PARTS)
@pytest.mark.parametrize("config", [TaylorSeerConfig(interval=1), HiCacheConfig(interval=1, adaptive=True)])
def test_the_estimate_is_what_is_kept(family, config):
    case = recorded(family)
    h2cache.enable(case.target, config)
    case.run()
    summary = h2cache.summary(case.target)
    h2cache.disable(case.target)
    assert summary.bytes_held == summary.bytes_needed > 0


def test_clusca_computes_a_token_of_each_cluster_in_every_mlp_of_dit():
    case = recorded("dit")
    tokens, queries, handles = [], [], []
    for block in case.transformers[0].transformer_blocks:
        for module, seen in ((block.ff.net[0], tokens), (block.attn1.to_q, queries)):
            note = partial(lambda seen, _, args: seen.append(args[0].shape[:2]), seen)
            handles.append(module.register_forward_pre_hook(note))
    h2cache.enable(case.target, ClusCaConfig(interval=9, warmup_steps=1, clusters=4))
    case.run()
    h2cache.disable(case.target)
    for handle in handles:
        handle.remove()
    blocks = len(case.transformers[0].transformer_blocks)
    whole = queries[0]
    assert queries == [whole] * blocks  # [cond, uncond], at the first step
    assert tokens == [whole] * blocks + [(2, 4)] * blocks * (STEPS - 1)


@pytest.mark.parametrize("family", PARTS)
def test_speca_compares_the_last_blocks_mlp_of_the_image(family, monkeypatch):
    pairs, inputs = [], []
    case = recorded(family)
    last = getattr(case.transformers[0].transformer_blocks[-1], PARTS[family][1])
    monkeypatch.setattr(speca, "error_of", lambda g, r, *how: pairs.append((g, r)) or error_of(g, r, *how))
    h2cache.enable(case.target, SpeCaConfig(base=1e9, floor=1e9, min_drafts=1, warmup_steps=1), steps=STEPS)
    own = last.forward
    last.forward = lambda x: inputs.append(x) or own(x)
    case.run()
    del last.forward
    h2cache.disable(case.target)
    assert len(pairs) == case.branches * (STEPS - 2)  # computed, drafted, then checked
    for (draft, real), x in zip(pairs, inputs[2 * case.branches :], strict=True):
        assert draft.shape == x.shape
        with torch.no_grad():
            assert torch.equal(real, last(x))


def test_an_mlp_that_runs_in_chunks_is_refused_before_anything_changes():
    pipeline, _ = FAMILIES["dit"]()
    model = pipeline.transformer
    blocks = model.transformer_blocks
    for block in blocks:
        block.set_chunk_feed_forward(4, 1)
    with pytest.raises(ValueError, match="set_chunk_feed_forward"):
        h2cache.enable(pipeline, TaylorSeerConfig())
    assert model.transformer_blocks is blocks
    assert not [m for m in model.modules() if "forward" in vars(m)]
    h2cache.enable(pipeline, TaylorSeerConfig(granularity="stage"))
