"""The shipped tiny Wan loads and draws; its generator, latent space and checker agree with each other."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.tiny_wan import clips, evaluate
from analysis.tiny_wan.latents import from_latent, to_latent

MODEL = Path(__file__).parents[1] / "assets/tiny_wan"
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


@pytest.mark.skipif(not MODEL.exists(), reason="the weights are not in this checkout")
def test_the_shipped_folder_loads_in_one_precision_and_draws():
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    parts = (pipe.text_encoder, pipe.transformer, pipe.vae)
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.float32}
    limits = json.loads((MODEL / "limits.json").read_text())
    given = {
        "height": limits["height"][0],
        "width": limits["width"][0],
        "num_frames": limits["num_frames"][0],
    }
    given |= {name: limits[name] for name in ("negative_prompt", "guidance_scale", "max_sequence_length")}
    seeded = torch.Generator().manual_seed(0)
    clip = pipe(limits["example"], num_inference_steps=6, generator=seeded, **given).frames[0]
    assert clip.shape == (17, 64, 64, 3)
    assert evaluate.check((clip * 255).round().astype(np.uint8), EXAMPLES[limits["example"]])["background_ok"]
