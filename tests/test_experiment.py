"""The experiment as a user types it, killed, divided over processes, and its arithmetic."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from analysis.experiment import contestants, main
from analysis.flops import count_forward
from analysis.intervals import bootstrap
from analysis.metrics import ClipIqa, fidelity, gmsd, more_fidelity, to_tensor
from analysis.prompts import read_prompts
from analysis.runs import Limits

METHODS = ["h2cache:tau1=0.3:tau2=0.3,inf", "block_cache:threshold=0.2"]


def arguments(out, *more, steps: int = 6, limit: int = 3) -> list[str]:
    return ["--out", str(out), "--steps", str(steps), "--limit", str(limit), "--methods", *METHODS, *more]


def facts(out) -> list[dict]:
    """What must not depend on how often a run was stopped: everything but times and memory."""
    table = json.loads((out / "table.json").read_text())["rows"]
    clock = ("seconds", "speed_up", "peak")
    return [{k: v for k, v in line.items() if not k.startswith(clock)} for line in table]


def test_the_experiment_makes_its_table(tmp_path, capsys):
    assert main(arguments(tmp_path, "--no-words")) == 0
    text = capsys.readouterr().out
    assert "| none | 108 | 1.00x |" in text
    assert "CLIP-IQA is null: no CLIP weights" in text
    assert "MS-SSIM is null" in text
    table = json.loads((tmp_path / "table.json").read_text())
    none, tight, loose, block = table["rows"]
    assert [x["label"] for x in table["rows"]] == [
        "none",
        "h2cache tau1=0.3 tau2=0.3",
        "h2cache tau1=0.3 tau2=inf",
        "block_cache threshold=0.2",
    ]
    assert none["identical"] == none["prompts"] == 3
    assert none["psnr"] is None
    assert none["bytes_held"] == 0
    assert 1 <= tight["blocks_ratio"] <= loose["blocks_ratio"]
    assert 0 < block["tflops"] <= none["tflops"]
    assert block["bytes_held"] > 0
    assert none["words_read"] is None
    assert table["published"][3]["speed_up"] == 5.08
    with open(tmp_path / "table.csv", newline="") as file:
        assert [line["label"] for line in csv.DictReader(file)] == [x["label"] for x in table["rows"]]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert all(0 < row["seconds_steps"] < row["seconds"] for row in rows)
    assert Image.open(tmp_path / "compare.png").width > 3 * 192

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.*")}
    assert main(arguments(tmp_path, "--no-words")) == 0  # nothing is done twice
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.*")}
    assert {p: t for p, t in after.items() if p.name != "settings.json"} == {
        p: t for p, t in before.items() if p.name != "settings.json"
    }
    assert main(arguments(tmp_path, "--no-words", steps=5)) == 0  # another setting, another folder
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_killed_at_random_moments_it_ends_as_if_undisturbed(tmp_path):
    """The long form of this, with ten kills, is in assets/results/README.md."""
    moments = random.Random(0)
    command = [sys.executable, "-m", "analysis.experiment", *arguments(tmp_path / "killed", "--no-words")]
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 120
        rows = tmp_path / "killed/runs"
        before = len(list(rows.glob("*/rows/*.json")))
        while time.monotonic() < end and len(list(rows.glob("*/rows/*.json"))) < before + 2:
            time.sleep(0.02)
        time.sleep(moments.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        finished = list(rows.glob("*/rows/*.json"))
        assert len(finished) >= before + 2
        for path in finished:
            row = json.loads(path.read_text())
            Image.open(path.parent.parent / "images" / f"{row['key']}.png").load()
    (rows / finished[0].parts[-3] / "rows/.half.json.999999999.tmp").write_text("{")  # as a kill may leave it
    assert main(arguments(tmp_path / "killed", "--no-words")) == 0
    assert not list(rows.rglob(".*"))
    assert main(arguments(tmp_path / "whole", "--no-words")) == 0
    assert facts(tmp_path / "killed") == facts(tmp_path / "whole")


def test_two_processes_divide_the_prompts(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29611",
    ]
    command = [*launcher, "-m", "analysis.experiment", *arguments(tmp_path / "two", "--no-words")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("| none |") == 1
    rows = [json.loads(line) for line in (tmp_path / "two/rows.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert json.loads((tmp_path / "two/table.json").read_text())["settings"]["processes"] == 2
    assert main(arguments(tmp_path / "one", "--no-words")) == 0
    assert facts(tmp_path / "two") == facts(tmp_path / "one")


def test_what_fails_is_told_and_the_rest_is_kept(tmp_path, capsys, monkeypatch):
    import analysis.experiment as experiment

    draw, broken = experiment.draw, []

    def sometimes(pipeline, config, seed, **call):
        if "CARP" in call["prompt"] and config.name == "block_cache" and not broken:
            broken.append(True)
            raise RuntimeError("out of memory")
        return draw(pipeline, config, seed, **call)

    monkeypatch.setattr(experiment, "draw", sometimes)
    assert main(arguments(tmp_path, "--no-words")) == 1
    assert "out of memory" in capsys.readouterr().err
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 11
    assert main(arguments(tmp_path, "--no-words")) == 0
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 12


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["--methods", "nope"], "unknown method 'nope'"),
        (["--methods", "h2cache:tau3=1"], "cannot set 'tau3=1'"),
        (["--methods", "h2cache:tau1=-1"], "tau1=-1.0 is out of range"),
        (["--height", "256"], "height=256"),
        (["--prompts", "missing.jsonl"], "missing.jsonl"),
        (["--model", "nowhere/"], "no model folder"),
    ],
)
def test_bad_input_is_named(tmp_path, capsys, bad, message):
    assert main(["--out", str(tmp_path), "--limit", "1", *bad]) == 2
    assert message in capsys.readouterr().err


def test_contestants_multiply_their_values():
    found = contestants(
        ["none", "h2cache:tau1=0.1,0.2:tau2=0.3,0.4", "fewer_steps"], "assets/tiny_flux", None
    )
    assert [c.label for c in found] == [
        "none",
        "h2cache tau1=0.1 tau2=0.3",
        "h2cache tau1=0.1 tau2=0.4",
        "h2cache tau1=0.2 tau2=0.3",
        "h2cache tau1=0.2 tau2=0.4",
        "fewer_steps",
    ]
    assert (found[4].config.tau1, found[4].config.tau2) == (0.2, 0.4)


def test_the_prompt_files_are_what_they_say():
    from pathlib import Path

    limits = Limits.of("assets/tiny_flux")
    for name in ("cute80", "cute80_tiny"):
        prompts = read_prompts(Path(f"assets/prompts/{name}.jsonl"))
        assert len(prompts) == len({p.text for p in prompts}) == 80
        for prompt in prompts:
            for word in prompt.words:
                assert word in prompt.text
            if name == "cute80_tiny":
                assert limits.warnings(prompt.text) == []


# Arithmetic.


def test_operations_of_flux_dev_are_the_known_ones():
    """74.385 TFLOP a step, 1.3048 and 1.3047 a block, at 1024x1024 and 512 text tokens."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
        call = {
            "hidden_states": torch.empty(1, 4096, 64),
            "encoder_hidden_states": torch.empty(1, 512, 4096),
            "pooled_projections": torch.empty(1, 768),
            "timestep": torch.empty(1),
            "guidance": torch.empty(1),
            "img_ids": torch.empty(4096, 3),
            "txt_ids": torch.empty(512, 3),
        }
        cost = count_forward(model, lambda: model(**call))
    assert cost.blocks["structure"] == pytest.approx(1.3048e12, rel=1e-4)
    assert cost.blocks["detail"] == pytest.approx(1.3047e12, rel=1e-4)
    one_step = [
        {"branch": "cond", "step": 0, "stage": stage, "blocks_run": n}
        for stage, n in (("structure", 19), ("detail", 38))
    ]
    assert cost.tflops(one_step) == pytest.approx(74.385, rel=1e-4)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_an_interval_holds_its_mean(values):
    found = bootstrap(values)
    assert min(values) - 1e-6 <= found.low <= found.high <= max(values) + 1e-6
    if len(set(values)) == 1:
        assert found.low == pytest.approx(found.high)


def test_an_interval_says_whether_a_difference_is_shown():
    assert bootstrap([1.0, 1.2, 0.9, 1.1]).shows_difference
    assert not bootstrap([1.0, -1.2, 0.9, -1.1]).shows_difference


def test_fidelity_of_known_pictures():
    grey, noise = (
        Image.new("RGB", (192, 192), (100, 100, 100)),
        Image.effect_noise((192, 192), 60).convert("RGB"),
    )
    assert fidelity(grey, grey) == {"psnr": None, "ssim": 1.0, "identical": True}
    lighter = Image.new("RGB", (192, 192), (110, 110, 110))
    assert fidelity(lighter, grey)["psnr"] == pytest.approx(28.131, abs=1e-3)  # 20 log10(255 / 10)
    same = more_fidelity(noise, noise)
    assert same["gmsd"] == 0
    assert same["ms_ssim"] == pytest.approx(1)
    assert more_fidelity(noise, grey)["gmsd"] > 0.1
    assert more_fidelity(noise.crop((0, 0, 128, 128)), grey.crop((0, 0, 128, 128)))["ms_ssim"] is None
    assert gmsd(to_tensor(noise), to_tensor(noise)).shape == (1,)


def test_clip_iqa_is_a_softmax_over_two_texts(tmp_path):
    """On a CLIP of random weights: the arithmetic, not the judgement."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision = text | {"image_size": 32, "patch_size": 8}
    tokenizer = CLIPTokenizer.from_pretrained("assets/tiny_flux/tokenizer")
    text |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)
    size = {"shortest_edge": 32}
    images = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(tmp_path)
    judge, picture = ClipIqa(str(tmp_path)), Image.effect_noise((64, 64), 60).convert("RGB")
    score = judge(picture)
    pixels = judge.processor(images=[picture], return_tensors="pt")["pixel_values"]
    features = judge.model.get_image_features(pixel_values=pixels)
    features = getattr(features, "pooler_output", features)
    good, bad = torch.nn.functional.cosine_similarity(features, judge.texts).tolist()
    assert score == pytest.approx(1 / (1 + 2.718281828 ** (100 * (bad - good))), abs=1e-4)
    with pytest.raises(OSError, match="hf download"):
        ClipIqa()
