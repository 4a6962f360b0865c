"""The shipped tiny Wan loads and draws; its generator, latent space and checker agree with each other."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import run
from analysis.drawing.draw import Limits
from analysis.tiny_wan import clips, evaluate
from analysis.tiny_wan.latents import from_latent, to_latent

MODEL = Path(__file__).parents[2] / "assets/tiny_wan"
EXAMPLES = {
    "a red circle moves left over a green background": clips.ClipSpec(
        "green", (clips.Thing("red", "circle", "moves left"),)
    ),
    "the word CAFE scrolls up over a blue background": clips.ClipSpec("blue", (), "CAFE", "scrolls up"),
    "an orange star turns clockwise over a purple background": clips.ClipSpec(
        "purple", (clips.Thing("orange", "star", "turns clockwise"),)
    ),
}


@pytest.mark.parametrize("text", EXAMPLES)
def test_prompts_say_what_is_drawn(text):
    assert clips.prompt(EXAMPLES[text]) == text


def test_the_checker_accepts_true_renderings():
    rng = random.Random(3)
    rows = [evaluate.check(clips.render(spec, rng), spec) for spec in evaluate.held_out(40)]
    assert np.mean([row["all_ok"] for row in rows]) >= 0.95


@pytest.mark.parametrize(
    ("drawn", "asked", "wrong"),
    [
        ("moves left", "moves right", "direction_ok"),
        ("moves left", "moves left slowly", "speed_ok"),
        ("fades in", "fades out", "action_ok"),
        ("grows", "stands still", "action_ok"),
    ],
)
def test_the_checker_refuses_another_motion(drawn, asked, wrong):
    frames = clips.render(clips.ClipSpec("green", (clips.Thing("red", "square", drawn),)))
    assert not evaluate.check(frames, clips.ClipSpec("green", (clips.Thing("red", "square", asked),)))[wrong]


def test_the_checker_reads_letters():
    frames = clips.render(clips.ClipSpec("blue", (), "CAFE", "scrolls up"))
    assert not evaluate.check(frames, clips.ClipSpec("blue", (), "CARE", "scrolls up"))["word_ok"]


def test_the_first_latent_frame_knows_the_first_frame_only():
    frames = torch.from_numpy(clips.render(EXAMPLES["a red circle moves left over a green background"]))[None]
    later = frames.clone()
    later[:, 1:] = 0
    assert torch.equal(to_latent(frames)[:, :, 0], to_latent(later)[:, :, 0])
    assert from_latent(to_latent(frames)).shape == frames.shape


def test_the_shipped_folder_loads_in_one_precision_and_draws():
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    parts = (pipe.text_encoder, pipe.transformer, pipe.vae)
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.float32}
    limits = json.loads((MODEL / "limits.json").read_text())
    given = limits["call"] | {"height": limits["height"][0], "width": limits["width"][0]}
    seeded = torch.Generator().manual_seed(0)
    clip = pipe(limits["example"], generator=seeded, **given | {"num_inference_steps": 6}).frames[0]
    assert clip.shape == (17, 64, 64, 3)
    assert evaluate.check((clip * 255).round().astype(np.uint8), EXAMPLES[limits["example"]])["background_ok"]


def test_run_draws_it_without_further_arguments(tmp_path, capsys):
    """But for the steps, which would take long; a cached clip shows the same background."""
    command = ["--model", str(MODEL), "--out", str(tmp_path), "--steps", "8", "--speedup", "2"]
    assert run.main(command) == 0
    assert "warning" not in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [(row["method"], row["guidance"]) for row in rows] == [("none", 3.0), ("plan", 3.0)]
    strip = np.asarray(Image.open(tmp_path / rows[1]["file"]))
    frames = np.stack(np.split(strip, clips.FRAMES, axis=1))
    assert frames.shape == (17, 64, 64, 3)
    assert evaluate.check(frames, EXAMPLES[rows[1]["prompt"]])["background_ok"]


def test_run_says_what_it_cannot_draw():
    limits = Limits.of(str(MODEL))
    assert not limits.warnings("the word CAFE scrolls up over a blue background")
    assert "castle" in limits.warnings("the word CAFE over a castle")[0]
    assert "TOOLONG" in limits.warnings("the word TOOLONG over a blue background")[0]
