"""`python run.py --model FOLDER` with a folder of each kind of family, and with pictures that go in."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import run as script
from analysis.drawing import families
from analysis.tiny_families import FAMILIES, parts

FAST = ["--steps", "3", "--tau1", "99", "--tau2", "99"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A function that saves a family's pipeline, once, as its makers publish theirs."""
    saved = {}

    def save(family: str) -> str:
        if family not in saved:
            saved[family] = str(tmp_path_factory.mktemp(family))
            FAMILIES[family]()[0].save_pretrained(saved[family])
        return saved[family]

    return save


def drawn(out, *options: str) -> list[dict]:
    assert script.main([*options, *FAST, "--out", str(out)]) == 0
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


SIZE = ["--height", "32", "--width", "32"]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("flux2_klein", SIZE),
        ("qwen_image", [*SIZE, "--negative-prompt", " ", "--true-cfg", "3"]),
        ("dit", ["--prompt", "207"]),
        ("sd3", SIZE),
        ("z_image", [*SIZE, "--negative-prompt", "blurred"]),
    ],
)
def test_a_folder_of_each_family_is_recognised(tmp_path, folder, family, options):
    none, cached = drawn(tmp_path, "--model", folder(family), *options)
    assert (none["method"], cached["method"]) == ("none", "h2cache")
    assert cached["blocks_run"] < none["blocks_run"] == none["blocks"]
    assert Image.open(tmp_path / cached["file"]).size == (32, 32)
    if "--negative-prompt" in options:
        assert cached["negative_prompt"] == options[options.index("--negative-prompt") + 1]


@pytest.mark.parametrize(("family", "ffmpeg"), [("wan", False), ("hunyuan_video", True)])
def test_frames_are_saved_as_a_video_and_in_a_row(tmp_path, folder, monkeypatch, family, ffmpeg):
    def export(frames, path: str, fps: int) -> None:  # imageio-ffmpeg itself may be missing here
        Path(path).write_text(f"{len(frames)} frames of {frames[0].size}, {fps} a second")

    monkeypatch.setattr(families.importlib.util, "find_spec", lambda name: object() if ffmpeg else None)
    monkeypatch.setattr(families, "export_to_video", export)
    none, cached = drawn(tmp_path, "--model", folder(family), *SIZE, "--frames", "5")
    assert cached["blocks_run"] < none["blocks_run"] == none["blocks"]
    assert Image.open(tmp_path / cached["file"]).size == (5 * 32, 32)
    if ffmpeg:
        assert (tmp_path / cached["video"]).read_text() == "5 frames of (32, 32), 16 a second"
    else:
        moving = Image.open(tmp_path / cached["video"])
        assert (moving.format, moving.size) == ("GIF", (32, 32))
    assert (tmp_path / cached["video"]).suffix == (".mp4" if ffmpeg else ".gif")
    assert cached["frames"] == 5


@pytest.fixture
def picture(tmp_path) -> str:
    path = tmp_path / "in.png"
    parts.picture(64).save(path)
    return str(path)


def test_a_picture_to_edit(tmp_path, folder, picture):
    alone = drawn(tmp_path / "a", "--model", folder("flux2_klein"), *SIZE, "--no-compare")
    edited = drawn(
        tmp_path / "b", "--model", folder("flux2_klein"), *SIZE, "--no-compare", "--input-image", picture
    )
    a, b = (np.asarray(Image.open(tmp_path / f / r[0]["file"])) for f, r in (("a", alone), ("b", edited)))
    assert not np.array_equal(a, b)
    assert edited[0]["input_image"] == picture


def test_a_picture_to_begin_with_where_the_pipeline_takes_none(tmp_path, picture):
    """The embedded model is text-to-image; its parts make an image-to-image pipeline."""
    none, cached = drawn(tmp_path / "out", "--steps", "5", "--input-image", picture)
    assert none["steps_recorded"] < 5  # it begins later
    assert cached["blocks_run"] < none["blocks_run"]


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("dit", ["--prompt", "a cat"], "draws classes"),
        ("dit", ["--prompt", "1", "--height", "64"], "takes no size"),
        ("dit", ["--prompt", "1", "--negative-prompt", "x"], "takes none"),
        ("dit", ["--prompt", "1", "--input-image", "PICTURE"], "takes no picture"),
        ("dit", ["--prompt", "1", "--frames", "5"], "draws pictures"),
        ("z_image", ["--true-cfg", "2"], "takes none"),
        ("qwen_image", ["--true-cfg", "2"], "give one"),
        ("flux2_klein", ["--input-image", "nowhere.png"], "nowhere.png"),
        ("flux_control", [], "begins with a picture"),
        ("flux_fill", ["--input-image", "PICTURE"], "needs a mask"),
    ],
)
def test_what_a_family_does_not_take_is_refused(tmp_path, folder, picture, capsys, family, options, message):
    options = [picture if o == "PICTURE" else o for o in options]
    command = ["--model", folder(family), *options, *FAST, "--out", str(tmp_path / "out")]
    assert script.main(command) == 2
    assert message in capsys.readouterr().err


def test_without_a_preset_the_message_proposes_the_calibration(tmp_path, folder, capsys):
    command = ["--model", folder("dit"), "--prompt", "1", "--steps", "2", "--out", str(tmp_path)]
    assert script.main([*command, "--no-compare"]) == 0
    assert f"python -m analysis.calibrate --model {folder('dit')}" in capsys.readouterr().err
