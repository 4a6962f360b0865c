"""The engines of nunchaku's FLUX on a stand-in with its signatures: nothing dropped, nothing called twice."""

import gc
import importlib
import sys
import types
from dataclasses import dataclass

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

import h2cache
from h2cache import H2Config, drop_in, find_method
from h2cache.engines import find_engine
from h2cache.method import Method, MethodConfig
from tests.helpers import nunchaku_double as double
from tests.helpers.nunchaku_double import make_v1, make_v2
from tests.helpers.toys import denoise, make_inputs

INF = float("inf")
ALL_HIT = H2Config(tau1=INF, tau2=INF)
OFF = H2Config(tau1=0, tau2=0)


def make_plain() -> FluxTransformer2DModel:
    """The model of diffusers with the weights of `make_v1` and `make_v2`."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(num_layers=3, num_single_layers=4, **double.CONFIG).eval()


@pytest.fixture(params=[make_v1, make_v2], ids=["V1", "V2"])
def model(request):
    return request.param()


@pytest.fixture
def v1():
    return make_v1()


def handle_of(model):
    """V1's handle, whether a cache is on or not."""
    m = model.transformer_blocks[0].m
    return getattr(m, "_handle", m)


def control(batch: int = 1, double: int = 2, single: int = 3) -> dict:
    """ControlNet samples: fewer than blocks, so that some serve several."""
    g = torch.Generator().manual_seed(5)
    samples = [torch.randn(batch, 16, 32, generator=g) for _ in range(double + single)]
    return {
        "controlnet_block_samples": samples[:double],
        "controlnet_single_block_samples": samples[double:],
    }


def pulid(model) -> dict:
    """PuLID on V1: its modules on the wrapper, and the arguments of its forward."""
    torch.manual_seed(6)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_out = nn.Linear(32, 32)

        def forward(self, embeddings, hidden_states):
            return self.to_out(hidden_states) * embeddings.mean()

    model.transformer_blocks[0].pulid_ca = nn.ModuleList(Attention() for _ in range(3))
    return {"id_embeddings": torch.full((1, 4), 0.3), "id_weight": 0.8}


def outcomes(model) -> list[tuple[str, str]]:
    return [(r.stage, r.outcome) for r in h2cache.step_records(model)]


# The same decisions and outputs as the diffusers engine.


@pytest.mark.parametrize("config", [OFF, ALL_HIT, H2Config(tau1=0, tau2=INF), H2Config(tau1=0.35, tau2=0.5)])
def test_it_does_what_the_engine_of_diffusers_does(model, config):
    plain = make_plain()
    h2cache.enable(plain, config)
    h2cache.enable(model, config)
    expected, outputs = denoise(plain, 8), denoise(model, 8)
    assert outcomes(model) == outcomes(plain)
    for a, b in zip(expected, outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(h2cache.step_records(plain), h2cache.step_records(model), strict=True):
        assert (a.measure is None) == (b.measure is None)
        assert a.measure is None or a.measure == pytest.approx(b.measure, rel=1e-3, abs=1e-6)
        assert a.blocks_run == b.blocks_run


@pytest.mark.parametrize(
    "config", [ALL_HIT, H2Config(tau1=0, tau2=INF), find_method("block_cache")(threshold=INF)]
)
def test_control_residuals_are_added_fresh_at_every_step(v1, config):
    plain = make_plain()
    h2cache.enable(plain, config)
    h2cache.enable(v1, config)
    for a, b in zip(denoise(plain, 5, **control()), denoise(v1, 5, **control()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("split", [1, 2, 5, 0.7])
def test_the_stages_may_be_cut_elsewhere(model, split):
    plain = make_plain()
    for cached in (plain, model):
        h2cache.enable(cached, H2Config(tau1=0, tau2=INF), split=split)
    for a, b in zip(denoise(plain, 4), denoise(model, 4), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert outcomes(model) == outcomes(plain)


def test_samples_of_a_batch_decide_for_themselves(v1):
    inputs, mixed = make_inputs(batch=2), H2Config(tau1=0.35, tau2=0.5)
    alone, decided = [], []
    for n in range(2):
        one = {k: v[n : n + 1] if v.shape[0] == 2 else v for k, v in inputs.items()}
        h2cache.enable(v1, mixed)
        alone.append(denoise(v1, 8, inputs=one))
        decided.append(outcomes(v1))
    assert decided[0] != decided[1]
    h2cache.enable(v1, mixed)
    for step, both in enumerate(denoise(v1, 8, inputs=inputs)):
        expected = torch.cat([alone[0][step], alone[1][step]])
        torch.testing.assert_close(both, expected, rtol=1e-3, atol=1e-4)


# Exactness with everything that V1 can take.


@pytest.mark.parametrize("extra", ["control", "double control", "single control", "pulid", "both", "batch"])
@pytest.mark.parametrize("method", ["h2cache", "block_cache", "none"])
def test_switched_off_is_bit_identical_with_it(v1, extra, method):
    given, inputs = {}, make_inputs(batch=2 if extra == "batch" else 1)
    if extra in ("control", "both"):
        given |= control()
    if extra == "double control":
        given |= control() | {"controlnet_single_block_samples": None}
    if extra == "single control":
        given |= control() | {"controlnet_block_samples": None}
    if extra in ("pulid", "both"):
        given |= pulid(v1)
    expected = denoise(v1, inputs=inputs, **given)
    plain = denoise(v1, inputs=inputs)
    if given:
        assert not torch.allclose(expected[-1], plain[-1])  # it has an effect
    config = {"h2cache": OFF, "block_cache": find_method("block_cache")(threshold=0)}
    h2cache.enable(v1, config.get(method) or find_method(method)())
    for a, b in zip(expected, denoise(v1, inputs=inputs, **given), strict=True):
        assert torch.equal(a, b)


def test_pulid_that_comes_or_goes_voids_what_is_stored(v1):
    identity = pulid(v1)
    h2cache.enable(v1, ALL_HIT)
    inputs = make_inputs()
    for timestep in (1.0, 0.75, 0.5, 0.25):
        now = identity if 0.4 <= timestep <= 0.8 else {}
        with torch.no_grad(), v1.cache_context("cond"):
            v1(**inputs | {"timestep": torch.tensor([timestep])}, **now)
    assert [o for s, o in outcomes(v1) if s == "structure"] == ["miss", "miss", "hit", "miss"]


def test_pulid_has_a_window_of_timesteps(v1):
    identity = pulid(v1) | {"start_timestep": 0.4, "end_timestep": 0.8}
    h2cache.enable(v1, ALL_HIT)
    engine = find_engine(v1)
    seen = [engine.inputs((), make_inputs(timestep=t) | identity).conditions[-1] for t in (1.0, 0.5, 0.3)]
    assert seen == [None, 0.8, None]


# One call where nothing is decided inside.


def calls_of(v1, config, steps: int = 6) -> dict:
    h2cache.enable(v1, config, steps=steps)
    handle_of(v1).calls.clear()
    denoise(v1, steps)
    return {k: n for k, n in handle_of(v1).calls.items() if n}


def test_fused_calls(v1):
    assert calls_of(v1, find_method("none")()) == {"forward": 6}
    block_cache = find_method("block_cache")
    assert calls_of(v1, block_cache(threshold=0)) == {"forward_layer": 6, "forward": 6}
    teacache = find_method("teacache")(threshold=INF, coefficients=(0.0, 0.0, 0.0, 1.0, 0.0))
    assert calls_of(v1, teacache) == {"norm_one_forward": 6, "forward": 2}
    warm = H2Config(tau1=INF, tau2=INF, warmup_steps=3, last_steps=2)
    # 0, 1 and 7, 8 at once; 2 learns, block by block (3 + 4); 3 to 6 run a head each
    assert calls_of(v1, warm, 9) == {"forward": 4, "forward_layer": 3 + 4, "forward_single_layer": 4 + 4}
    assert [o for s, o in outcomes(v1) if s == "detail"] == ["miss"] * 3 + ["forced"] * 4 + ["miss"] * 2


def test_infinite_thresholds_run_the_two_heads(v1):
    h2cache.enable(v1, ALL_HIT)
    denoise(v1, 5)
    first, later = handle_of(v1).log[:7], handle_of(v1).log[7:]
    assert first == [("double", n) for n in range(3)] + [("single", n) for n in range(4)]
    assert later == [("double", 0), ("single", 0)] * 4


def test_disabled_it_is_one_call_a_step(v1):
    h2cache.enable(v1, ALL_HIT)
    denoise(v1)
    h2cache.disable(v1)
    handle_of(v1).calls.clear()
    denoise(v1, 4)
    assert dict(handle_of(v1).calls) == {"forward": 4}


def test_nothing_is_kept_as_the_handle_returned_it(v1):
    """It might be a view of a buffer that the next call overwrites."""
    methods = [ALL_HIT, find_method("block_cache")(threshold=INF)]
    methods.append(find_method("teacache")(threshold=INF, coefficients=(0.0, 0.0, 0.0, 1.0, 0.0)))
    handle = handle_of(v1)

    def overwrite(*_) -> None:
        for tensor in handle.returned:
            tensor.fill_(float("nan"))
        handle.returned.clear()

    for config in methods:
        h2cache.enable(v1, config, steps=4)
        expected = denoise(v1, 4)
        handle.returned.clear()
        hook = v1.register_forward_pre_hook(overwrite)
        assert all(map(torch.equal, expected, denoise(v1, 4)))
        hook.remove()


# The handle stays nunchaku's.


def test_one_wrapper_one_handle(v1):
    wrapper, handle = v1.transformer_blocks[0], v1.transformer_blocks[0].m
    for _ in range(2):
        h2cache.enable(v1, ALL_HIT)
        assert v1.transformer_blocks[0] is wrapper
    wrapper.m.setLoraScale(32, 0.5)
    wrapper.m.setAttentionImpl("nunchaku-fp16", None)
    assert handle.calls["setLoraScale"] == handle.calls["setAttentionImpl"] == 1
    h2cache.disable(v1)
    assert wrapper.m is handle
    assert handle.calls["reset"] == 0


@pytest.mark.parametrize("cached", [True, False])
def test_the_handle_is_reset_once_when_the_model_goes(cached):
    model = make_v1()
    handle = handle_of(model)
    if cached:
        h2cache.enable(model, ALL_HIT)
    denoise(model, 2, branch=None)  # diffusers' cache_context makes a cycle of its own
    gc.disable()
    try:
        del model
        assert handle.calls["reset"] == 1  # at once: nothing in a cycle holds the weights
    finally:
        gc.enable()


def test_lora_before_and_after(v1):
    name = "transformer_blocks.1.ff.net.2.bias"
    lora = {name: torch.full((32,), 0.5)}
    other = make_v1()
    other.transformer_blocks[0].m.loadDict(lora, True)
    expected = denoise(other)
    h2cache.enable(v1, OFF)
    v1.transformer_blocks[0].m.loadDict(lora, True)
    h2cache.enable(other, OFF)
    for a, b, c in zip(expected, denoise(v1), denoise(other), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


# Refusals.


class IPA_TransformerBlocks(double.NunchakuFluxTransformerBlocks):
    """Named as nunchaku's."""


def test_ip_adapter_is_refused_also_after_enabling(v1):
    h2cache.enable(v1, ALL_HIT)
    handle = handle_of(v1)
    v1.transformer_blocks = nn.ModuleList([IPA_TransformerBlocks(handle, "cpu")])
    with pytest.raises(ValueError, match="IP-Adapter"):
        denoise(v1)
    with pytest.raises(ValueError, match="IP-Adapter"):
        h2cache.enable(v1, ALL_HIT)


def test_nunchakus_own_cache_is_refused_also_after_enabling(model):
    h2cache.enable(model, ALL_HIT)
    model._original_forward = model.forward
    with pytest.raises(ValueError, match="nunchaku's own cache"):
        denoise(model)
    with pytest.raises(ValueError, match="apply_cache_on_pipe"):
        h2cache.enable(model, ALL_HIT)


def test_what_is_not_loaded_is_refused():
    torch.manual_seed(0)
    empty = double.NunchakuFluxTransformer2dModel(num_layers=1, num_single_layers=1, **double.CONFIG)
    with pytest.raises(ValueError, match="from_pretrained"):
        h2cache.enable(empty)


def test_a_method_that_needs_modules_is_refused(model):
    @dataclass(frozen=True)
    class Fine(MethodConfig):
        name = "fine"
        requires = frozenset({"modules"})

        def build(self) -> Method:
            raise AssertionError("not reached")

    with pytest.raises(ValueError, match="modules"):
        h2cache.enable(model, Fine())


# The drop-in and the subclasses.


def test_the_drop_in_takes_nunchakus_names(model, monkeypatch):
    seen, enable = [], drop_in.enable
    monkeypatch.setattr(drop_in, "enable", lambda pipe, config: seen.append(config) or enable(pipe, config))
    enabled = lambda: seen[-1]  # noqa: E731
    pipe = type("Pipeline", (), {"transformer": model, "scheduler": None})()
    call = type(model).forward
    assert (
        h2cache.apply_cache_on_pipe(
            pipe,
            use_double_fb_cache=True,
            residual_diff_threshold_multi=0.15,
            residual_diff_threshold_single=0.22,
        )
        is pipe
    )
    assert enabled() == H2Config(tau1=0.15, tau2=0.22)
    h2cache.apply_cache_on_pipe(pipe, use_double_fb_cache=True, residual_diff_threshold=0.2)
    assert enabled() == H2Config(tau1=0.2, tau2=0.1)
    h2cache.apply_cache_on_transformer(model)
    assert enabled() == find_method("block_cache")(threshold=0.12)
    h2cache.apply_cache_on_transformer(model, residual_diff_threshold_multi=-1.0)
    assert enabled() == find_method("none")()
    assert type(model).forward is call
    with pytest.raises(TypeError, match="residual_diff_treshold"):
        h2cache.apply_cache_on_pipe(pipe, residual_diff_treshold=0.1)
    assert len(denoise(model, 2)) == 2


def test_the_subclasses_load_with_a_cache(monkeypatch):
    """With a package of nunchaku's names in its place."""
    package = types.ModuleType("nunchaku")

    def loads(make):
        def from_pretrained(cls, path, return_metadata=False):
            model = make()
            model.__class__ = cls
            return (model, {"path": path}) if return_metadata else model

        return classmethod(from_pretrained)

    for base, make in (
        (double.NunchakuFluxTransformer2dModel, make_v1),
        (double.NunchakuFluxTransformer2DModelV2, make_v2),
    ):
        setattr(package, base.__name__, type(base.__name__, (base,), {"from_pretrained": loads(make)}))
    monkeypatch.setitem(sys.modules, "nunchaku", package)
    monkeypatch.setitem(sys.modules, "nunchaku._C", types.ModuleType("nunchaku._C"))
    monkeypatch.delitem(sys.modules, "h2cache.models.nunchaku", raising=False)
    try:
        model = h2cache.H2NunchakuFluxTransformer2DModelV2.from_pretrained("file", cache_config=ALL_HIT)
        assert isinstance(model, package.NunchakuFluxTransformer2DModelV2)
        denoise(model, 4)
        assert h2cache.summary(model).blocks_run == 7 + 3 * 2
        model, metadata = h2cache.H2NunchakuFluxTransformer2dModel.from_pretrained(
            "file", return_metadata=True
        )
        assert metadata == {"path": "file"}
        assert h2cache.summary(model).method == "h2cache"
        h2cache.disable(model)
        assert type(model.transformer_blocks[0].m) is double.QuantizedFluxModel
    finally:
        sys.modules.pop("h2cache.models.nunchaku", None)


def test_without_nunchaku_the_subclasses_say_what_to_do():
    if importlib.util.find_spec("nunchaku"):
        pytest.skip("nunchaku is installed here")
    assert "nunchaku" not in sys.modules  # importing h2cache imports no engine's library
    with pytest.raises(ImportError, match=r"nunchaku is not installed: .*--engine diffusers"):
        h2cache.H2NunchakuFluxTransformer2dModel  # noqa: B018
