"""The small Inf-DiT: its pairs, its training, the shipped folder, and `run.py` enlarging a picture."""

import json
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import run
from analysis.drawing.draw import load_pipeline
from analysis.tiny_flux import signs
from analysis.tiny_flux.evaluate import held_out
from analysis.tiny_infdit import assemble, pairs, train
from analysis.tiny_infdit.model import SCALE, enlarge
from analysis.tiny_infdit.pipeline import InfDiTPipeline

SHIPPED = Path(__file__).parents[2] / "assets/tiny_infdit"
SMALL = ["--width", "16", "--depth", "3", "--pictures", "1", "--each", "2"]


@pytest.fixture(scope="module")
def pipe() -> InfDiTPipeline:
    found = load_pipeline(str(SHIPPED), "cpu", None)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture
def picture(tmp_path) -> Path:
    """Part of the shipped example: a letter and the rim."""
    path = tmp_path / "part.png"
    Image.open(SHIPPED / "example.png").crop((24, 40, 56, 72)).save(path)
    return path


def test_shipped_folder_is_small_and_of_one_dtype(pipe):
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) <= 4_000_000
    assert {weight.dtype for weight in pipe.model.parameters()} == {torch.float32}


def test_a_true_sign_comes_back_nearer_than_by_interpolation(pipe):
    """A held-out one, its small picture once as it is and once through the VAE of the embedded model."""
    spec, _ = held_out(1)[0]
    for vae in (None, pairs.load_vae(Path(assemble.FLUX))):
        large, small = pairs.pair(spec, random.Random(1), vae)
        large, small = large[..., 160:288, 160:288], small[..., 40:72, 40:72]
        levels = ((small[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        found = pipe(Image.fromarray(levels), 8, torch.Generator().manual_seed(0), output_type="pt").images
        errors = [(x.clamp(-1, 1) - large).square().mean().item() for x in (found, enlarge(small))]
        assert errors[0] < 0.6 * errors[1]


def test_run_enlarges_a_picture(tmp_path, picture):
    command = ["--model", str(SHIPPED), "--input-image", str(picture), "--out", str(tmp_path / "out")]
    assert run.main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "out/records.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["none", "h2cache", "plan"]
    assert {(row["steps"], row["prompt"], row["input_image"]) for row in rows} == {(8, "", str(picture))}
    none, *cached = rows
    assert none["blocks_run"] == none["blocks"] == (2 * 8 - 1) * 8  # evaluations, layers
    assert all(row["blocks_run"] < none["blocks"] for row in cached)
    for row in rows:
        assert Image.open(tmp_path / "out" / row["file"]).size == (128, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "begins with a picture: give one with --input-image"),
        (["--input-image", "README.md"], "cannot identify image file"),
        (["--input-image", "ODD"], "the picture is 30x32"),
        (["--input-image", "PICTURE", "--prompt", "a sign"], "takes no text"),
        (["--input-image", "PICTURE", "--height", "128"], "takes no size"),
        (["--input-image", "PICTURE", "--sampler", "ddim"], "has one of its own only"),
        (["--input-image", "BOMB"], "exceeds limit"),
    ],
)
def test_what_it_cannot_enlarge_is_refused(tmp_path, picture, capsys, options, message):
    odd = tmp_path / "odd.png"
    Image.open(picture).crop((0, 0, 30, 32)).save(odd)
    bomb = tmp_path / "bomb.png"  # its header says 60000x60000
    size = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13)
    bomb.write_bytes(start + size + struct.pack(">I", zlib.crc32(size)) + b"\0\0\0\0IDAT")
    options = [
        {"PICTURE": str(picture), "ODD": str(odd), "BOMB": str(bomb)}.get(option, option)
        for option in options
    ]
    out = tmp_path / "out"
    assert run.main(["--model", str(SHIPPED), *options, "--steps", "2", "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not list(out.glob("*.png"))


@pytest.mark.parametrize("steps", [0, -1])
def test_it_takes_one_step_at_least(pipe, picture, steps):
    with pytest.raises(ValueError, match="one at least"):
        pipe(Image.open(picture), steps)


def test_grey_of_16_bits_is_enlarged_as_that_of_8(pipe, picture):
    grey = Image.open(picture).convert("L")
    fine = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert fine.mode == "I;16"
    one, other = (pipe(p, 2, torch.Generator().manual_seed(0), "pt").images for p in (grey, fine))
    assert torch.equal(one, other)


def test_an_enlarged_sign_is_the_same_sign():
    for spec, _ in held_out(4):
        large, small = signs.render(spec, enlarged=SCALE), signs.render(spec)
        assert large.shape == (512, 512, 3)
        reduced = np.asarray(Image.fromarray(large).reduce(SCALE), float)
        assert np.abs(reduced - small).mean() < 5  # of 255: only edges differ


def test_both_pictures_of_a_pair_show_the_same_place():
    large, small = pairs.batch(None, random.Random(0), pictures=2, each=3, side=16)
    assert (large.shape, small.shape) == ((6, 3, 64, 64), (6, 3, 16, 16))
    assert (F.avg_pool2d(large, SCALE) - small).abs().max() < 0.01


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("infdit")
    train.main(["--work", str(folder), "--max-steps", "3", *SMALL])
    return folder


def test_training_goes_on_where_it_was_stopped(work):
    before = torch.load(work / "checkpoint.pt")
    train.main(["--work", str(work), "--max-steps", "5", *SMALL])
    after = torch.load(work / "checkpoint.pt")
    assert (before["step"], after["step"]) == (3, 5)
    assert not torch.equal(before["weights"], after["weights"])


def test_training_refuses_a_checkpoint_of_another_size(work):
    with pytest.raises(SystemExit, match="sizes"):
        train.main(["--work", str(work), "--max-steps", "5", *SMALL, "--depth", "4"])


def test_assembled_folder_enlarges(work, tmp_path):
    assemble.assemble(work, tmp_path)
    pipe = load_pipeline(str(tmp_path), "cpu", None)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(Image.new("RGB", (32, 16)), 2).images[0].size == (128, 64)
    kept = train.load_model(work / "checkpoint.pt").half().state_dict()
    for name, value in pipe.model.half().state_dict().items():
        assert torch.equal(value, kept[name])
