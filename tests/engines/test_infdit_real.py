"""The engine of Inf-DiT on the authors' own code, and our small module against it.

    H2CACHE_AUTHORS=FOLDER python -m pytest tests/engines/test_infdit_real.py

FOLDER has a checkout named Inf-DiT (THUDM, e710c3f); needs SwissArmyTransformer 0.4.12 and what it imports
(einops, omegaconf, boto3, datasets, tensorboardX, webdataset, sentencepiece). Stand-ins take the place of
what only a GPU has. Skipped without them.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import h2cache
from analysis.tiny_infdit.model import attend
from h2cache import H2Config, PlanConfig, find_method
from h2cache.engines.infdit import Upscaler
from tests.helpers.infdit import make_infdit, picture

AUTHORS = Path(os.environ.get("H2CACHE_AUTHORS", "/nowhere")) / "Inf-DiT"
STEPS = 6  # 11 evaluations
MODEL = (
    "--image-size 32 --input-time adaln --nogate --no-crossmask --in-channels 6 --out-channels 3 "
    "--patch-size 4 --random-position --qk-ln --image-block-size 16 --re-position --cross-lr"
)
SIZES = {  # of `make_infdit`; the rest is what SwissArmyTransformer asks for
    "num_layers": 6, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 1, "layernorm_order": "pre",
    "max_sequence_length": 256, "hidden_dropout": 0.0, "attention_dropout": 0.0, "layernorm_epsilon": 1e-6,
    "model_parallel_size": 1, "skip_init": False, "use_gpu_initialization": False, "mode": "inference",
    "checkpoint_activations": False, "checkpoint_num_layers": 1, "checkpoint_skip_layers": 0,
    "inner_hidden_size": None, "hidden_size_per_attention_head": None, "is_decoder": False,
    "fp16": False, "bf16": False,
}  # fmt: skip

pytestmark = pytest.mark.skipif(
    not (AUTHORS / "dit").is_dir() or importlib.util.find_spec("sat") is None,
    reason="H2CACHE_AUTHORS has no Inf-DiT, or SwissArmyTransformer is not installed",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The authors' model with random weights, and ours with the same ones."""
    with pytest.MonkeyPatch.context() as patch:
        real = authors_model(patch, tmp_path_factory.mktemp("infdit"))
        ours = make_infdit()
        torch.manual_seed(1)
        for name, weight in real.named_parameters():
            if "adaLN_modulation" in name or "re_pos_embed" in name:  # 0 at the beginning
                weight.copy_(torch.randn_like(weight) * 0.1)
        ours.load_state_dict({k: v for k, v in real.state_dict().items() if k in ours.state_dict()})
        yield real, ours


def authors_model(patch, folder: Path):
    def stand_in(name: str, **attributes) -> None:
        module = ModuleType(name)
        vars(module).update(attributes)
        patch.setitem(sys.modules, name, module)

    checkpointing = SimpleNamespace(is_configured=lambda: False)
    stand_in("deepspeed", checkpointing=checkpointing, init_distributed=lambda *a, **k: None)
    stand_in("flash_attn", flash_attn_qkvpacked_func=None, flash_attn_func=attend)
    stand_in("sat.model.position_embedding.triton_rotary", apply_rotary=None)
    stand_in("wandb")
    stand_in("open_clip")
    import sat  # noqa: F401  before torchvision is stood in for

    stand_in("torchvision.transforms")
    stand_in("torchvision", transforms=sys.modules["torchvision.transforms"])
    stand_in("torchvision.utils", make_grid=None)
    stand_in("torchvision.transforms.functional", InterpolationMode=None)
    patch.syspath_prepend(str(AUTHORS))
    from dit.model import DiffusionEngine
    from omegaconf import OmegaConf

    config = OmegaConf.load(AUTHORS / "configs/text2image-sr.yaml")
    config.modules.pop("image_encoder_config")
    config.modeling.loss_config = {"target": "torch.nn.Identity"}
    config.modeling.sampler_config.params.device = "cpu"
    OmegaConf.save(config, folder / "config.yaml")
    parser = DiffusionEngine.add_model_specific_args(argparse.ArgumentParser())
    args = parser.parse_args([*MODEL.split(), "--config-path", str(folder / "config.yaml")])
    vars(args).update(SIZES)
    torch.manual_seed(0)
    return DiffusionEngine(args).eval().requires_grad_(False)


@torch.no_grad()
def upscale(upscaler: Upscaler, real: bool, height: int = 32) -> torch.Tensor:
    """A picture from the same noise in both models: the authors draw it from the global generator."""
    call = picture(height=height)
    if not real:
        torch.manual_seed(0)
        call["noise"] = torch.randn_like(call["images"])
        return upscaler(**call, num_steps=STEPS)
    del call["noise"]
    torch.manual_seed(0)
    return upscaler(**call, num_steps=STEPS, device=torch.device("cpu"))


@pytest.mark.parametrize("height", [32, 48])
def test_our_module_gives_the_authors_picture(models, height):
    real, ours = models
    theirs = upscale(Upscaler(real), True, height)
    assert torch.isfinite(theirs).all()
    torch.testing.assert_close(upscale(Upscaler(ours), False, height), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        H2Config(tau1=0.3, tau2=0.2),
        find_method("hicache")(granularity="stage", interval=3),
        PlanConfig(speedup=3.0),
    ],
    ids=lambda config: config.name,
)
def test_a_cache_decides_the_same_on_both(models, config):
    """One branch, 2 n - 1 evaluations; with the cache off the authors' picture, bit for bit."""
    plain = upscale(Upscaler(models[0]), True)
    pictures, decisions = [], []
    for model, real in zip(models, (True, False), strict=True):
        upscaler = Upscaler(model)
        h2cache.enable(upscaler, config)
        pictures.append(upscale(upscaler, real))
        records = h2cache.step_records(upscaler)
        decisions.append([(r.step, r.stage, r.branch, r.outcome, r.blocks_run) for r in records])
        h2cache.disable(upscaler)
    assert decisions[0] == decisions[1]
    assert {branch for _, _, branch, *_ in decisions[0]} == {"call 0"}
    assert {step for step, *_ in decisions[0]} == {*range(2 * STEPS - 1)}
    assert any(outcome != "miss" for *_, outcome, _ in decisions[0])
    torch.testing.assert_close(*pictures, rtol=1e-3, atol=1e-3)
    assert torch.equal(upscale(Upscaler(models[0]), True), plain)


def test_threshold_0_is_bit_identical(models):
    upscaler = Upscaler(models[0])
    plain = upscale(upscaler, True)
    h2cache.enable(upscaler, H2Config(tau1=0.0, tau2=0.0))
    assert torch.equal(upscale(upscaler, True), plain)
    h2cache.disable(upscaler)


def test_the_mode_by_blocks_is_refused(models):
    real, _ = models
    upscaler, call = Upscaler(real), picture()
    del call["noise"]
    h2cache.enable(upscaler, H2Config())
    with pytest.raises(ValueError, match="ar=False"), torch.no_grad():
        upscaler(**call, num_steps=2, device=torch.device("cpu"), ar=True)
    h2cache.disable(upscaler)
