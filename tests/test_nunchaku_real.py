"""The engines on nunchaku's real Python classes, over an emulated compiled module; skipped without them.

    NUNCHAKU_EMULATION=../shared/nunchaku_emulation NUNCHAKU_SRC=FOLDER_OF_NUNCHAKU_SOURCES \
    H2CACHE_AUTHORS_SRC=CHECKOUT_OF_THE_AUTHORS_CODE python -m pytest tests/test_nunchaku_real.py

The emulation turns CUDA devices into the CPU for the whole process: run this file alone. With the real wheel
only the signatures are compared here, since it takes full-size checkpoints only: on a GPU that it supports,
`python -m analysis.bench_step --engine nunchaku` checks the same equality.
"""

import importlib.util
import inspect
import os
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import nunchaku_double
import pytest
import torch
from diffusers import FluxTransformer2DModel

import h2cache
from analysis import bench_step
from h2cache import H2Cache, H2Config, find_method
from h2cache.predictors import LastResidual
from h2cache.stages import Run, Skip

INF = float("inf")
OFF, ALL_HIT = H2Config(tau1=0, tau2=0), H2Config(tau1=INF, tau2=INF)
EMULATION, AUTHORS = os.environ.get("NUNCHAKU_EMULATION"), os.environ.get("H2CACHE_AUTHORS_SRC")

emulated = pytest.mark.skipif(not EMULATION, reason="needs NUNCHAKU_EMULATION and nunchaku's sources")
with_authors = pytest.mark.skipif(not AUTHORS, reason="needs H2CACHE_AUTHORS_SRC, the authors' code")


@pytest.fixture(scope="session")
def nunchaku():
    """The real package, over its own compiled module or an emulated one."""
    if EMULATION:
        sys.path.insert(0, str(Path(EMULATION).resolve()))
        import make_env

        return make_env.setup()
    pytest.importorskip("nunchaku._C", reason="nunchaku is not installed, and NUNCHAKU_EMULATION is not set")
    return importlib.import_module("nunchaku")


@pytest.fixture(scope="session", params=["int4", "fp4"])
def checkpoint(nunchaku, request, tmp_path_factory):
    import make_env

    make_env.setup((8, 9) if request.param == "int4" else (12, 0))
    folder = tmp_path_factory.mktemp(request.param)
    return make_env.tiny_checkpoint(layers=3, singles=5, precision=request.param, folder=folder)[1]


@pytest.fixture(
    params=["NunchakuFluxTransformer2dModel", "NunchakuFluxTransformer2DModelV2"], ids=["V1", "V2"]
)
def model(nunchaku, checkpoint, request):
    return getattr(nunchaku, request.param).from_pretrained(checkpoint)


@pytest.fixture
def v1(nunchaku, checkpoint):
    return nunchaku.NunchakuFluxTransformer2dModel.from_pretrained(checkpoint)


def denoise(model, steps: int = 5, batch: int = 1, extra: dict | None = None) -> list[torch.Tensor]:
    """Forward calls at falling timesteps with slowly changing inputs and one prompt."""
    import make_env

    outputs, text = [], None
    for n in range(steps):
        inputs = make_env.inputs(model.config, t=1 - n / steps, batch=batch)
        text = inputs["encoder_hidden_states"] if text is None else text
        inputs["encoder_hidden_states"] = text
        with torch.no_grad(), model.cache_context("cond"):
            outputs.append(model(**inputs, **(extra or {}), return_dict=False)[0])
    return outputs


def draw(model, steps: int = 20, size: int = 256) -> torch.Tensor:
    """Latents of a run of a FluxPipeline."""
    import make_env

    return make_env.run_pipeline(make_env.tiny_pipeline(model), steps=steps, size=size)


def assert_equal(expected, outputs) -> None:
    assert len(expected) == len(outputs)
    for a, b in zip(expected, outputs, strict=True):
        assert torch.equal(a, b)


# The stand-in that CI runs on has the signatures of the real thing.


def parameters(function) -> dict:
    """Names and defaults, without self and what this version has besides."""
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found if p.name != "self" and p.kind is not p.VAR_KEYWORD}


def test_the_stand_in_has_the_real_signatures(nunchaku):
    v1 = importlib.import_module("nunchaku.models.transformers.transformer_flux")
    v2 = importlib.import_module("nunchaku.models.transformers.transformer_flux_v2")
    wrapper, double = v1.NunchakuFluxTransformerBlocks, nunchaku_double.NunchakuFluxTransformerBlocks
    for name in (
        "__init__",
        "forward",
        "set_pulid_residual_callback",
        "reset_pulid_residual_callback",
        "norm1",
    ):
        assert parameters(getattr(double, name)) == parameters(getattr(wrapper, name)), name
    for name, module in (("NunchakuFluxTransformer2dModel", v1), ("NunchakuFluxTransformer2DModelV2", v2)):
        real, ours = getattr(module, name), getattr(nunchaku_double, name)
        assert parameters(ours.forward) == parameters(real.forward)
        assert issubclass(real, FluxTransformer2DModel)
    single = v2.NunchakuFluxSingleTransformerBlock.forward
    assert parameters(nunchaku_double.NunchakuFluxSingleTransformerBlock.forward) == parameters(single)
    double_block = parameters(v2.NunchakuFluxTransformerBlock.forward)
    assert list(double_block)[:4] == ["hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb"]


@emulated
def test_the_stand_in_has_the_handles_signatures(nunchaku):
    real = sys.modules["nunchaku._C"].QuantizedFluxModel
    for name in ("forward", "forward_layer", "forward_single_layer", "norm_one_forward", "loadDict"):
        ours = getattr(nunchaku_double.QuantizedFluxModel, name)
        assert parameters(ours) == parameters(getattr(real, name)), name
    for name in ("setLoraScale", "setAttentionImpl", "set_residual_callback", "isBF16", "reset"):
        assert hasattr(real, name)


# Exactness.


@emulated
@pytest.mark.parametrize("method", ["h2cache", "block_cache", "teacache", "none"])
def test_switched_off_is_bit_identical(model, method):
    expected = denoise(model)
    config = {
        "h2cache": OFF,
        "block_cache": find_method("block_cache")(threshold=0),
        "teacache": find_method("teacache")(threshold=0, coefficients=(0.0, 0.0, 0.0, 1.0, 0.0)),
        "none": find_method("none")(),
    }[method]
    assert model.training  # as nunchaku's loader leaves it
    h2cache.enable(model, config, steps=5)
    assert_equal(expected, denoise(model))
    assert h2cache.summary(model).blocks_run == 5 * 8
    h2cache.disable(model)
    assert_equal(expected, denoise(model))


@emulated
def test_a_pipeline_at_zero_thresholds_is_bit_identical(model):
    expected = draw(model, steps=6)
    h2cache.enable(model, OFF)
    assert torch.equal(expected, draw(model, steps=6))


def control(config, batch: int = 1) -> dict:
    g = torch.Generator().manual_seed(3)
    width = config["attention_head_dim"] * config["num_attention_heads"]
    samples = [0.3 * torch.randn(batch, 64, width, generator=g).bfloat16() for _ in range(5)]
    return {"controlnet_block_samples": samples[:2], "controlnet_single_block_samples": samples[2:]}


def lora(config, seed: int = 4) -> dict[str, torch.Tensor]:
    """A LoRA in diffusers' names over attention and MLP of every block."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(seed)
    plain = FluxTransformer2DModel.from_config(config)
    targets = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"]
    plain.add_adapter(LoraConfig(r=16, target_modules=targets, init_lora_weights=False))
    state = get_peft_model_state_dict(plain)
    return {f"transformer.{k}": v.detach().bfloat16() for k, v in state.items()}


@emulated
@pytest.mark.parametrize("extra", ["control", "batch", "batch and control"])
def test_v1_is_bit_identical_with_it(v1, extra):
    batch = 2 if "batch" in extra else 1
    given = control(v1.config, batch) if "control" in extra else {}
    expected = denoise(v1, batch=batch, extra=given)
    assert given == {} or not torch.equal(expected[-1], denoise(v1, batch=batch)[-1])
    for config in (OFF, find_method("block_cache")(threshold=0)):
        h2cache.enable(v1, config)
        assert_equal(expected, denoise(v1, batch=batch, extra=given))


@emulated
@pytest.mark.parametrize("enabled_first", [True, False])
def test_v1_is_bit_identical_with_a_lora(nunchaku, v1, checkpoint, enabled_first):
    plain = denoise(v1)
    other = nunchaku.NunchakuFluxTransformer2dModel.from_pretrained(checkpoint)
    other.update_lora_params(lora(v1.config))
    other.set_lora_strength(0.8)
    other.set_attention_impl("nunchaku-fp16")
    expected = denoise(other)
    assert not torch.equal(plain[-1], expected[-1])
    if enabled_first:
        h2cache.enable(v1, OFF)
    v1.update_lora_params(lora(v1.config))
    v1.set_lora_strength(0.8)
    v1.set_attention_impl("nunchaku-fp16")
    if not enabled_first:
        h2cache.enable(v1, OFF)
    assert_equal(expected, denoise(v1))
    v1.reset_lora()
    v1.set_attention_impl("flashattn2")
    h2cache.disable(v1)
    assert_equal(plain, denoise(v1))


@emulated
def test_v1_is_bit_identical_with_pulid(v1):
    from nunchaku.models.pulid.pulid_forward import pulid_forward

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = torch.nn.Linear(128, 128, dtype=torch.bfloat16)

        def forward(self, embeddings, hidden_states):
            return self.out(hidden_states) * embeddings.mean()

    torch.manual_seed(2)
    v1.transformer_blocks[0].pulid_ca = torch.nn.ModuleList(Attention() for _ in range(4))
    v1.forward = types.MethodType(pulid_forward, v1)
    plain = denoise(v1)
    given = {"id_embeddings": torch.full((1, 4), 0.5).bfloat16(), "id_weight": 0.9}
    expected = denoise(v1, extra=given)
    assert not torch.equal(plain[-1], expected[-1])
    for config in (OFF, find_method("block_cache")(threshold=0), find_method("none")()):
        h2cache.enable(v1, config)
        assert_equal(expected, denoise(v1, extra=given))
    h2cache.enable(v1, ALL_HIT)
    denoise(v1, extra=given)
    assert [r.blocks_run for r in h2cache.step_records(v1)] == [3, 5, *[1, 1] * 4]


@emulated
def test_infinite_thresholds_run_blocks_0_and_0(v1):
    h2cache.enable(v1, ALL_HIT)
    v1.transformer_blocks[0].m.log.clear()
    denoise(v1, 6)
    assert v1.transformer_blocks[0].m.log[8:] == [("double", 0), ("single", 0)] * 5


@emulated
def test_v2_refuses_control_as_before(nunchaku, checkpoint):
    model = nunchaku.NunchakuFluxTransformer2DModelV2.from_pretrained(checkpoint)
    h2cache.enable(model, OFF)
    with pytest.raises(NotImplementedError, match="Controlnet"):
        denoise(model, extra=control(model.config))
    denoise(model)  # and goes on


# The same decisions as other code, over 20 steps of a pipeline.


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


# Classes and scripts.


@emulated
def test_the_subclasses(nunchaku, checkpoint):
    model, metadata = h2cache.H2NunchakuFluxTransformer2dModel.from_pretrained(
        checkpoint, return_metadata=True
    )
    assert "quantization_config" in metadata
    assert isinstance(model, nunchaku.NunchakuFluxTransformer2dModel)
    v2 = h2cache.H2NunchakuFluxTransformer2DModelV2.from_pretrained(checkpoint, cache_config=ALL_HIT)
    assert isinstance(v2, nunchaku.NunchakuFluxTransformer2DModelV2)
    draw(model, steps=4)
    draw(v2, steps=4)
    assert [r.blocks_run for r in h2cache.step_records(v2)] == [3, 5, 1, 1, 1, 1, 1, 1]
    assert h2cache.summary(model).steps == 4


@emulated
@pytest.mark.parametrize("given", [[], ["--v1"]], ids=["V2", "V1"])
def test_bench_step(nunchaku, checkpoint, given, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "emulation")
    command = ["--engine", "nunchaku", "--checkpoint", str(checkpoint), "--side", "128", "--text", "32"]
    assert bench_step.main([*command, "--device", "cuda", "--rounds", "1", "--burst", "1", *given]) == 0
    assert "identical at zero thresholds: yes" in capsys.readouterr().out
