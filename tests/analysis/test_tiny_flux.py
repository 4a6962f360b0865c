"""The tiny FLUX: its generator, checker, latents, training and the shipped folder."""

import random
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file

from analysis.tiny_flux import assemble, evaluate, signs, train
from analysis.tiny_flux.latents import from_latent, pack, to_latent, unpack
from analysis.tiny_flux.model import load_transformer
from analysis.tiny_flux.text_encoders import MAX_TOKENS, build_encoders, build_tokenizer
from analysis.tiny_flux.vae import build_vae

SHIPPED = Path(__file__).parents[2] / "assets/tiny_flux"
TINY = ["--width", "32", "--double", "1", "--single", "1", "--batch", "8", "--micro", "4", "--workers", "1"]


def signs_of(seed: int, count: int) -> list[tuple[signs.SignSpec, str, np.ndarray]]:
    rng = random.Random(seed)
    specs = [signs.sample_spec(rng) for _ in range(count)]
    return [(spec, signs.prompt(spec, rng), signs.render(spec, rng)) for spec in specs]


def test_generator_repeats_for_a_seed():
    for (spec, text, picture), (spec2, text2, picture2) in zip(signs_of(5, 20), signs_of(5, 20), strict=True):
        assert (spec, text) == (spec2, text2)
        assert np.array_equal(picture, picture2)


@pytest.mark.parametrize("clip", [False, True])
def test_every_prompt_fits_and_is_known(clip):
    tokenizer = build_tokenizer(clip)
    rng = random.Random(6)
    for _ in range(500):
        ids = tokenizer(signs.prompt(signs.sample_spec(rng), rng)).input_ids
        assert len(ids) <= MAX_TOKENS
        assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("shape", signs.SHAPES)
@pytest.mark.parametrize("curved", [False, True])
def test_letters_stay_inside_their_shape(shape, curved):
    for count in range(1 + curved, 6):
        for slot in signs.letter_slots(shape, count, curved):
            assert slot.width >= 12
            for x, y in signs.slot_corners(slot):
                assert signs.inside(shape, (x - 64) / signs.RADIUS, (y - 64) / signs.RADIUS)


def test_checker_accepts_true_renderings():
    found = [evaluate.check(picture, spec) for spec, _, picture in signs_of(7, 20)]
    for name in ("sign_ok", "background_ok", "shape_ok", "texture_ok"):
        assert sum(not row[name] for row in found) <= 1, name


def test_checker_rejects_another_sign():
    pictures = signs_of(8, 6)
    for (spec, _, _), (other, _, picture) in pairwise(pictures):
        found = evaluate.check(picture, spec)
        assert found["background_ok"] == (spec.background == other.background)


def test_latents_round_trip():
    images = torch.from_numpy(np.stack([picture for _, _, picture in signs_of(9, 4)]))
    latents = to_latent(images)
    assert torch.equal(unpack(pack(latents)), latents)
    again = to_latent(from_latent(latents))
    assert (again - latents).pow(2).mean() < 0.02  # what rounding and clipping to bytes costs
    assert (from_latent(latents).float() - images.float()).abs().mean() < 15


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Untrained text encoders and VAE, and a transformer of three steps."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tokenizers = build_tokenizer(clip=False), build_tokenizer(clip=True)
    t5, clip = build_encoders(len(tokenizers[0]))
    t5.save_pretrained(folder / "text_encoder_2")
    clip.save_pretrained(folder / "text_encoder")
    tokenizers[0].save_pretrained(folder / "tokenizer_2")
    tokenizers[1].save_pretrained(folder / "tokenizer")
    build_vae().save_pretrained(folder / "vae")
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # here: loading everything in a process of its own takes seconds
        patch.setattr(train.mp, "spawn", lambda work, given, count: work(0, *given))
        train.main(["--work", str(folder), "--device", "cpu", "--max-steps", "3", "--no-compile", *TINY])
    return folder


def test_training_goes_on_where_it_was_stopped(work):
    """In a process of its own."""
    before = torch.load(work / "checkpoint.pt")
    assert before["step"] == 3
    assert before["seen"] == 24
    train.main(["--work", str(work), "--device", "cpu", "--max-steps", "5", "--no-compile", *TINY])
    after = torch.load(work / "checkpoint.pt")
    assert after["step"] == 5
    assert after["optimizer"]["steps"] == 5
    assert not torch.equal(before["weights"], after["weights"])


def test_training_refuses_a_checkpoint_of_another_size(work):
    with pytest.raises(SystemExit, match="sizes"):
        train.main(["--work", str(work), "--device", "cpu", "--max-steps", "5", "--width", "64"])


def test_assembled_folder_draws(work, tmp_path):
    from diffusers import FluxPipeline

    assemble.assemble(work, tmp_path)
    pipe = FluxPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe(
        assemble.EXAMPLE, height=128, width=128, num_inference_steps=2, max_sequence_length=24
    ).images
    assert pictures[0].size == (128, 128)
    limits = assemble.limits(pipe.tokenizer)
    words = re.findall("[a-z]+", assemble.EXAMPLE)
    assert set(words) <= set(limits["vocabulary"])
    kept = load_transformer(work / "checkpoint.pt").half().state_dict()
    for name, value in pipe.transformer.half().state_dict().items():
        assert torch.equal(value, kept[name])


def names_in(folder: Path) -> set[str]:
    return set(load_file(folder / "text_encoder/model.safetensors"))


def test_weights_have_the_names_that_transformers_4_reads_too(work, tmp_path):
    """Without the prefix it takes random weights, and says so only where nobody looks."""
    assemble.assemble(work, tmp_path)
    assert names_in(tmp_path) == names_in(SHIPPED)
    assert all(name.startswith("text_model.") for name in names_in(SHIPPED))


def test_shipped_folder_is_small_and_says_24():
    from transformers import PreTrainedTokenizerFast

    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) <= 16_000_000
    for name in ("tokenizer", "tokenizer_2"):
        assert PreTrainedTokenizerFast.from_pretrained(SHIPPED / name).model_max_length == MAX_TOKENS


def test_a_blurred_sign_lacks_the_finest_power():
    for spec, _, picture in signs_of(3, 4):
        blurred = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1))
        assert evaluate.fine(np.asarray(blurred), spec) < 0.5 * evaluate.fine(picture, spec)
        assert evaluate.fine(signs.render(spec), spec) == 1.0
