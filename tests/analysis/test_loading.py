"""Engines, LoRA and offload as options of the scripts."""

import argparse
import json
from argparse import Namespace

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import run as script
from analysis import bench_step
from analysis.drawing import load as loading
from analysis.drawing.load import add_loading_arguments, choose_engine, load, load_quantized
from h2cache import nunchaku_install
from tests.helpers.toys import TINY, generate


def options(*given: str) -> Namespace:
    parser = argparse.ArgumentParser()
    add_loading_arguments(parser, "cpu")
    return Namespace(model=TINY, **vars(parser.parse_args(given)))


@pytest.fixture
def lora_file(tmp_path):
    """A LoRA for the embedded model, as diffusers writes it, with values large enough to see."""
    pipeline = load(options())[0]
    pipeline.transformer.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    state = get_peft_model_state_dict(pipeline.transformer)
    folder = tmp_path / "lora"
    type(pipeline).save_lora_weights(folder, transformer_lora_layers={k: 3 * v for k, v in state.items()})
    return folder / "pytorch_lora_weights.safetensors"


def test_a_lora_at_its_scale(lora_file):
    plain, name = load(options())
    assert name == TINY
    expected = generate(plain)
    pictures = {}
    for scale in ("0", "0.8", "1"):
        pipeline, name = load(options("--lora", str(lora_file), "--lora-scale", scale))
        assert name == f"{TINY} + {lora_file} at {scale}"
        pictures[scale] = generate(pipeline)
    torch.testing.assert_close(pictures["0"], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(pictures["0.8"], expected, atol=0.05)
    assert not torch.allclose(pictures["0.8"], pictures["1"], atol=0.01)


def test_a_lora_goes_with_a_cache_and_into_the_records(lora_file, tmp_path):
    out = tmp_path / "out"
    command = ["--steps", "4", "--lora", str(lora_file), "--lora-scale", "0.8", "--out", str(out)]
    assert script.main([*command, "--tau1", "9", "--tau2", "9"]) == 0
    rows = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert {row["model"] for row in rows} == {f"{TINY} + {lora_file} at 0.8"}
    assert rows[1]["blocks_run"] == 18 + 3 * 2


def test_a_lora_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"no LoRA file 'nowhere\.safetensors'"):
        load(options("--lora", "nowhere.safetensors"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--offload"], "device=cpu"),
        (["--checkpoint", "x.safetensors"], "needs --engine nunchaku"),
        (["--engine", "nunchaku"], "needs an NVIDIA GPU"),
    ],
)
def test_options_that_cannot_be_met_are_refused(given, says, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(nunchaku_install.torch.cuda, "is_available", lambda: False)
    assert script.main([*given, "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err


def test_auto_takes_nunchaku_only_where_it_can_run(monkeypatch):
    works = {"capability": (8, 9), "installed": True}
    monkeypatch.setattr(loading.torch.cuda, "get_device_capability", lambda *_: works["capability"])
    monkeypatch.setattr(loading, "install_problem", lambda _: None if works["installed"] else "missing")
    dev = "black-forest-labs/FLUX.1-dev"
    assert choose_engine("auto", dev, None, "cuda") == "nunchaku"
    assert choose_engine("auto", "/models/FLUX.1-dev/", None, "cuda:1") == "nunchaku"
    assert choose_engine("auto", "/models/mine", "mine.safetensors", "cuda") == "nunchaku"
    assert choose_engine("auto", "Qwen/Qwen-Image", None, "cuda") == "diffusers"
    assert choose_engine("auto", dev, None, "cpu") == "diffusers"
    works["installed"] = False
    assert choose_engine("auto", dev, None, "cuda") == "diffusers"
    assert choose_engine("nunchaku", dev, None, "cuda") == "nunchaku"  # asked for: the error says what to do
    works |= {"installed": True, "capability": (9, 0)}
    assert choose_engine("auto", dev, None, "cuda") == "diffusers"


@pytest.fixture
def fake_nunchaku(monkeypatch):
    """A package of nunchaku's names that notes what is asked of it, on a GPU of the capability in `asked`."""
    import sys
    import types

    asked = {"capability": (8, 9)}

    def loads(name):
        class Model(torch.nn.Module):
            @classmethod
            def from_pretrained(cls, path, **options):
                asked.update(kind=name, path=path, options=options)
                return cls()

            def update_lora_params(self, path):
                asked["lora"] = path

            def set_lora_strength(self, strength):
                asked["strength"] = strength

        return Model

    package, utils = types.ModuleType("nunchaku"), types.ModuleType("nunchaku.utils")
    package.NunchakuFluxTransformer2dModel, package.NunchakuFluxTransformer2DModelV2 = (
        loads("V1"),
        loads("V2"),
    )
    utils.get_precision = lambda: "fp4" if asked["capability"][0] == 12 else "int4"
    for name, module in (("nunchaku", package), ("nunchaku.utils", utils), ("nunchaku._C", package)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: asked["capability"])
    return asked


def test_version_precision_and_checkpoint(fake_nunchaku):
    asked = fake_nunchaku
    dev = {"model": "black-forest-labs/FLUX.1-dev"}

    def loaded(*given: str, **changed) -> dict:
        args = Namespace(**{**vars(options(*given)), **dev, **changed})
        model, asked["dtype"] = load_quantized(args, "cuda")
        assert not model.training
        return asked

    loaded()
    assert asked["kind"] == "V2"
    assert asked["path"] == "nunchaku-tech/nunchaku-flux.1-dev/svdq-int4_r32-flux.1-dev.safetensors"
    assert asked["options"] == {"device": "cuda", "torch_dtype": torch.bfloat16}
    loaded("--lora", "XLabs-AI/flux-RealismLora/lora.safetensors", "--lora-scale", "0.8")
    assert (asked["kind"], asked["strength"]) == ("V1", 0.8)
    assert asked["lora"] == "XLabs-AI/flux-RealismLora/lora.safetensors"
    loaded("--offload")
    assert asked["kind"] == "V1"
    assert asked["options"]["offload"] is True
    loaded("--checkpoint", "mine.safetensors", model="mine")
    assert (asked["kind"], asked["path"]) == ("V2", "mine.safetensors")
    asked["capability"] = (12, 0)
    loaded(model="black-forest-labs/FLUX.1-schnell")
    assert asked["path"] == "nunchaku-tech/nunchaku-flux.1-schnell/svdq-fp4_r32-flux.1-schnell.safetensors"
    asked["capability"] = (7, 5)  # Turing has no bfloat16
    loaded()
    assert (asked["kind"], asked["dtype"], asked["options"]["torch_dtype"]) == (
        "V1",
        "float16",
        torch.float16,
    )
    with pytest.raises(ValueError, match="no 4-bit checkpoint is known for 'mine'"):
        loaded(model="mine")
    with pytest.raises(ValueError, match="float32"):
        loaded(dtype="float32")


def test_bench_step_on_the_embedded_model(capsys, tmp_path):
    report = tmp_path / "bench.json"
    given = ["--device", "cpu", "--engine", "diffusers", "--rounds", "2", "--burst", "2"]
    assert bench_step.main([*given, "--out", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "identical at zero thresholds: yes" in printed
    rows = json.loads(report.read_text())["steps"]
    assert [row["step"] for row in rows] == ["uncached", "miss, miss", "miss, hit", "hit, hit"]
    assert [row["blocks"] for row in rows] == [18, 18, 7, 2]
    assert rows[0]["share"] == 1
    assert all(row["fastest"] <= row["milliseconds"] <= row["slowest"] for row in rows)
    assert rows[3]["milliseconds"] < rows[0]["milliseconds"]
