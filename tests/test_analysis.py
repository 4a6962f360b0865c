"""The measuring commands, as a user types them, on very little."""

import json
import subprocess
import sys

import pytest

from analysis.calibrate import best, main


def calibrate(monkeypatch, folder, *more) -> int:
    prompts = folder / "p.jsonl"
    prompts.write_text(
        "".join(
            json.dumps({"prompt": f'a red round sign that says "{w}" on a white background', "words": [w]})
            + "\n"
            for w in ("GO", "CAFE")
        )
    )
    arguments = ["--prompts", str(prompts), "--out", str(folder / "out"), "--steps", "6", *more]
    monkeypatch.setattr(sys, "argv", ["calibrate", *arguments])
    return main()


def test_calibration_measures_pairs_and_goes_on_where_it_ended(tmp_path, monkeypatch, capsys):
    pairs = ["--pairs", "0/0", "0.4/0.4", "inf/inf"]
    assert calibrate(monkeypatch, tmp_path, *pairs) == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    exact, some, most = summary["table"]
    assert (exact["blocks"], exact["psnr"], exact["ssim"]) == (1.0, None, 1.0)  # identical: no PSNR
    assert 1 < some["blocks"] <= most["blocks"] == pytest.approx(6 * 18 / (18 + 5 * 2))
    assert some["prompts"] == 2
    before = (tmp_path / "out/records-0-of-1.jsonl").read_text()
    assert calibrate(monkeypatch, tmp_path, *pairs) == 0
    assert (tmp_path / "out/records-0-of-1.jsonl").read_text() == before
    assert "best with at least 2.0x fewer blocks: tau1" in capsys.readouterr().out


def test_calibration_names_a_broken_setting(tmp_path, monkeypatch, capsys):
    assert calibrate(monkeypatch, tmp_path, "--pairs", "0.1/-1") == 2
    assert "tau2=-1.0 is out of range" in capsys.readouterr().err


def test_the_best_pair_is_fast_enough_and_closest():
    lines = [{"blocks": b, "psnr": p} for b, p in ((1.9, 60), (2.1, 40), (2.5, 45), (4, 30))]
    assert best(lines, 2.0)["psnr"] == 45
    assert best(lines, 3.0)["blocks"] == 4
    assert best(lines, 9.0) is None


@pytest.mark.parametrize("more", [[], ["--width", "32", "--heads", "2", "--double", "2", "--single", "3"]])
def test_overhead_is_measured(more):
    done = subprocess.run(
        [sys.executable, "-m", "analysis.overhead", "--rounds", "1", "--burst", "2", *more],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["blocks of an all-hit step"] == 2
    assert set(report["milliseconds"]) == {"uncached", "all hit", "structure miss", "disabled", "heads"}


def test_words_are_read_in_a_rendered_sign():
    import random

    from PIL import Image

    from analysis.ocr import word_recall
    from analysis.tiny_flux.signs import SignSpec, render

    sign = SignSpec("red", "white", "square", "plain", "STOP", False)
    picture = Image.fromarray(render(sign, random.Random(0)))
    assert word_recall(["stop"], picture) == 1.0
    assert word_recall(["STOP", "GO"], picture) == 0.5
    assert word_recall([], picture) is None
