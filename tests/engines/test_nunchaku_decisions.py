"""The same decisions as nunchaku's and the authors' code, over 20 steps; see `nunchaku_env.py`."""

import importlib.util
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import h2cache
from h2cache import H2Cache, H2Config
from h2cache.predictors import LastResidual
from h2cache.program import Run, Skip
from tests.helpers.nunchaku_env import AUTHORS, draw, emulated, with_authors


@dataclass(frozen=True)
class TwoChecksConfig(H2Config):
    """nunchaku's double cache: whole tensors, means in bfloat16, and the second check is always asked."""

    def build(self):
        return TwoChecks(self)


class TwoChecks(H2Cache):
    def step(self, stages, memory):
        for stage, tau in zip(stages, (self.config.tau1, self.config.tau2), strict=True):
            slot = memory.slot(stage.name, LastResidual)
            head = yield Run(stage.head)
            residual = stage.measured(head)
            old = slot.reference
            change = None if old is None else [((old - residual).abs().mean() / old.abs().mean()).item()]
            hit = change is not None and change[0] < tau
            if hit:
                yield Skip(stage.rest, slot.predictor.predict())
            else:
                rest = yield Run(stage.rest)
                slot.predictor.learn(rest.residual, kept=[False])
                slot.refer(residual)
            memory.record(stage, change, [tau], "hit" if hit else "miss")


def blocks_by_step(model) -> list[tuple[int, int]]:
    runs = [r.blocks_run for r in h2cache.step_records(model)]
    return list(zip(runs[::2], runs[1::2], strict=True))


class Count:
    """Counts the blocks that run, by step: V1 from the handle's log, V2 by hooks on the blocks."""

    def __init__(self, model, log: list | None) -> None:
        self.steps: list[list[int]] = []
        self.log = log
        model.register_forward_pre_hook(lambda *_: self.steps.append([0, 0]))
        if log is None:
            for n, blocks in enumerate((model.transformer_blocks, model.single_transformer_blocks)):
                for block in blocks:
                    block.register_forward_hook(lambda *_, n=n: self.add(n))
        else:
            model.register_forward_hook(self.read)

    def add(self, n: int) -> None:
        self.steps[-1][n] += 1

    def read(self, *_) -> None:
        self.steps[-1] = [sum(kind == k for kind, _ in self.log) for k in ("double", "single")]
        self.log.clear()

    @property
    def by_step(self) -> list[tuple[int, int]]:
        return [tuple(step) for step in self.steps]


@emulated
@pytest.mark.parametrize("taus", [(0.155, 0.2), (0.1, 0.22), (0.25, 0.19)])
@pytest.mark.parametrize("version", ["V1", "V2"])
def test_the_decisions_of_nunchakus_double_cache(nunchaku, checkpoint, version, taus, monkeypatch):
    from nunchaku.caching import fbcache, utils
    from nunchaku.caching.diffusers_adapters import flux, flux_v2

    name = {"V1": "NunchakuFluxTransformer2dModel", "V2": "NunchakuFluxTransformer2DModelV2"}[version]
    ours = getattr(nunchaku, name).from_pretrained(checkpoint)
    h2cache.enable(ours, TwoChecksConfig(tau1=taus[0], tau2=taus[1]))
    latents = draw(ours)

    theirs = getattr(nunchaku, name).from_pretrained(checkpoint)
    monkeypatch.setattr(utils, "num_transformer_blocks", 3)
    monkeypatch.setattr(utils, "num_single_transformer_blocks", 5)
    count = Count(theirs, theirs.transformer_blocks[0].m.log if version == "V1" else None)
    {"V1": flux, "V2": flux_v2}[version].apply_cache_on_transformer(
        theirs,
        use_double_fb_cache=True,
        residual_diff_threshold_multi=taus[0],
        residual_diff_threshold_single=taus[1],
    )
    with fbcache.cache_context(fbcache.create_cache_context()):
        expected = draw(theirs)
    assert count.by_step == blocks_by_step(ours)
    assert len(set(count.by_step)) > 1  # not all steps are alike
    assert torch.equal(latents, expected)
    with pytest.raises(ValueError, match="nunchaku's own cache"):
        h2cache.enable(theirs)


@pytest.fixture
def authors(nunchaku, monkeypatch):
    """The authors' `caching.utils`, with the sizes of the tiny model in place of FLUX.1-dev's."""
    import nunchaku.models.transformers.utils as where_it_was

    monkeypatch.setattr(where_it_was, "pad_tensor", nunchaku.utils.pad_tensor, raising=False)
    monkeypatch.setitem(sys.modules, "nunchaku.caching.FBthresholding", types.ModuleType("unused"))
    spec = importlib.util.spec_from_file_location("authors_utils", Path(AUTHORS) / "caching" / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.num_transformer_blocks, module.num_single_transformer_blocks = 3, 5
    module.MULTI_POOL_SIZES, module.SINGLE_POOL_SIZES = 128, 96  # windows of 2 and 3, of 256 and 288 tokens
    return module


@emulated
@with_authors
@pytest.mark.parametrize("taus", [(0.155, 0.25), (0.1, 0.2), (0.2, 0.2)])
def test_the_decisions_of_the_authors_code(nunchaku, checkpoint, authors, taus):
    ours = nunchaku.NunchakuFluxTransformer2dModel.from_pretrained(checkpoint)
    h2cache.enable(ours, H2Config(tau1=taus[0], tau2=taus[1], pool1=128, pool2=96, reduce="mean"))
    latents = draw(ours)

    theirs = nunchaku.NunchakuFluxTransformer2dModel.from_pretrained(checkpoint)
    count = Count(theirs, theirs.transformer_blocks[0].m.log)
    blocks = authors.FluxCachedTransformerBlocks(
        transformer=types.SimpleNamespace(
            transformer_blocks=theirs.transformer_blocks, single_transformer_blocks=None, device="cpu"
        ),
        use_double_fb_cache=True,
        residual_diff_threshold_multi=taus[0],
        residual_diff_threshold_single=taus[1],
        return_hidden_states_first=False,
    )
    theirs.transformer_blocks = torch.nn.ModuleList([blocks])
    with authors.cache_context(authors.create_cache_context()):
        expected = draw(theirs)
    assert count.by_step == blocks_by_step(ours)
    assert len(set(count.by_step)) > 1
    assert torch.equal(latents, expected)
