"""The tiny DiT: its data, judge, training and the shipped folder."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image

import run
from analysis.tiny_dit import assemble, digits, train, vae
from analysis.tiny_dit.classifier import Judge, frechet

SHIPPED = Path(__file__).parents[2] / "assets/tiny_dit"
SMALL = ["--width", "16", "--layers", "2", "--batch", "8", "--copies", "2"]


@pytest.fixture(scope="module")
def pipe() -> DiTPipeline:
    found = DiTPipeline.from_pretrained(SHIPPED)
    found.set_progress_bar_config(disable=True)
    return found


def draw(pipe: DiTPipeline, name: str, steps: int, guidance: float = 1.5, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    labels = pipe.get_label_ids([name])
    found = pipe(labels, guidance_scale=guidance, generator=generator, num_inference_steps=steps)
    return found.images[0]


def test_shipped_folder_is_small_and_of_one_dtype(pipe):
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) <= 4_000_000
    assert {weight.dtype for part in (pipe.transformer, pipe.vae) for weight in part.parameters()} == {
        torch.float32
    }


def test_unused_class_rows_are_zero(pipe):
    """The pipeline asks for class 1000 as none; the rows between cost space on disk, but pack to nothing."""
    for name, table in pipe.transformer.named_parameters():
        if "embedding_table" in name:
            assert table[: digits.CLASSES].abs().amax(1).min() > 0
            assert table[train.NULL].abs().max() > 0
            assert table[digits.CLASSES : train.NULL].abs().max() == 0


def test_labels_are_words_and_numerals(pipe):
    assert pipe.get_label_ids(["seven", "7"]) == [7, 7]
    assert pipe.get_label_ids(list(digits.NAMES)) == list(range(digits.CLASSES))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_draws_in_two_steps(pipe, guidance):
    assert draw(pipe, "three", steps=2, guidance=guidance).size == (digits.SIDE, digits.SIDE)


def test_draws_the_digit_asked_for(pipe):
    limits = assemble.limits()
    usual = limits["call"]
    picture = draw(pipe, limits["example"], usual["num_inference_steps"], usual["guidance_scale"])
    assert Judge.of(SHIPPED / "judge").classes([picture]) == pipe.get_label_ids([limits["example"]])


def test_enlarging_keeps_the_scan():
    scans = torch.zeros(2, 1, 8, 8)
    scans[0, 0, 1:7, 3:5] = 1
    scans[1, 0, 2, 1:7] = 0.5
    assert (digits.to_scans(digits.enlarge(scans)) - scans).abs().mean() < 0.02


def test_varying_by_nothing_changes_nothing():
    pictures = digits.enlarge(torch.rand(2, 1, 8, 8))
    same = digits.vary(pictures, torch.Generator().manual_seed(0), strength=0.0)
    assert (same - pictures).abs().max() < 1e-3


def test_a_fifth_of_every_class_is_held_out():
    labels = torch.arange(100) % digits.CLASSES
    kept, held = digits.split(labels)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(100))
    assert labels[held].bincount().tolist() == [2] * digits.CLASSES


def test_frechet_distance_of_shifted_points_is_the_shift():
    points = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    mean, covariance = points.mean(0), torch.cov(points.T)
    assert frechet(mean, covariance, points) == pytest.approx(0, abs=1e-5)
    assert frechet(mean, covariance, points + 2) == pytest.approx(20, rel=1e-4)


def test_run_draws_it_without_further_arguments(tmp_path, capsys):
    """But for the steps."""
    command = ["--model", str(SHIPPED), "--out", str(tmp_path), "--steps", "10", "--speedup", "2"]
    assert run.main(command) == 0
    assert "warning" not in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [(row["method"], row["guidance"], row["prompt"]) for row in rows] == [
        ("none", 1.5, "seven"),
        ("plan", 1.5, "seven"),
    ]
    pictures = [Image.open(tmp_path / row["file"]) for row in rows]
    assert Judge.of(SHIPPED / "judge").classes(pictures) == [7, 7]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A VAE of two steps and a small transformer of three, of every twentieth scan."""
    pytest.importorskip("sklearn")
    folder, (scans, labels) = tmp_path_factory.mktemp("dit"), digits.load_scans()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "load_scans", lambda: (scans[::20], labels[::20]))
        vae.main(["--out", str(folder), "--max-steps", "2", "--batch", "2"])
        train.main(["--work", str(folder), "--max-steps", "3", *SMALL])
    return folder


def test_training_goes_on_where_it_was_stopped(work):
    before = torch.load(work / "checkpoint.pt")
    assert before["step"] == 3
    train.main(["--work", str(work), "--max-steps", "5", *SMALL])
    after = torch.load(work / "checkpoint.pt")
    assert after["step"] == after["optimizer"]["steps"] == 5
    assert not torch.equal(before["weights"], after["weights"])


def test_training_refuses_a_checkpoint_of_another_size(work):
    with pytest.raises(SystemExit, match="sizes"):
        train.main(["--work", str(work), "--max-steps", "5", *SMALL, "--layers", "3"])


def test_assembled_folder_draws(work, tmp_path):
    assemble.assemble(work, tmp_path)
    pipe = DiTPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert draw(pipe, "two", steps=2).size == (digits.SIDE, digits.SIDE)
    kept = train.load_transformer(work / "checkpoint.pt").half().state_dict()
    for name, value in pipe.transformer.half().state_dict().items():
        assert torch.equal(value, kept[name])
