"""The engines on nunchaku's real Python classes; see `nunchaku_env.py` for how to run them."""

import importlib
import inspect
import sys
import types

import pytest
import torch
from diffusers import FluxTransformer2DModel

import h2cache
from analysis import bench_step
from h2cache import H2Config, find_method
from tests.helpers import nunchaku_double
from tests.helpers.nunchaku_env import assert_equal, denoise, draw, emulated

INF = float("inf")
OFF, ALL_HIT = H2Config(tau1=0, tau2=0), H2Config(tau1=INF, tau2=INF)


@pytest.fixture(
    params=["NunchakuFluxTransformer2dModel", "NunchakuFluxTransformer2DModelV2"], ids=["V1", "V2"]
)
def model(nunchaku, checkpoint, request):
    return getattr(nunchaku, request.param).from_pretrained(checkpoint)


@pytest.fixture
def v1(nunchaku, checkpoint):
    return nunchaku.NunchakuFluxTransformer2dModel.from_pretrained(checkpoint)


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
