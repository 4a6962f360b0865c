"""The measuring commands, as a user types them, on very little."""

import json
import sys

import pytest

from analysis import overhead
from analysis.calibrate import main
from analysis.records.planes import best, read, table
from analysis.tiny_families import FAMILIES


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


def test_rows_of_other_settings_do_not_blend(tmp_path, monkeypatch, capsys):
    pairs = ["--pairs", "0.4/0.4"]
    assert calibrate(monkeypatch, tmp_path, *pairs) == 0
    rows = read(tmp_path / "out")
    told = {"steps": 6, "seed": 0, "guidance": 3.5, "height": 128, "dtype": "torch.float32"}
    assert all(told.items() <= row["settings"].items() for row in rows)
    assert rows[0]["settings"]["model"] == "assets/tiny_flux"
    assert calibrate(monkeypatch, tmp_path, *pairs, "--seed", "5") == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert [line["prompts"] for line in summary["table"]] == [2]
    assert summary["settings"]["seed"] == 5
    with pytest.raises(ValueError, match="rows of several settings"):
        table(read(tmp_path / "out"))
    capsys.readouterr()
    assert calibrate(monkeypatch, tmp_path, "--table") == 0
    text = capsys.readouterr().out
    assert text.count("Settings: {") == text.count("| 0.4 | 0.4 |") == 2


def test_shards_share_their_rows(tmp_path, monkeypatch):
    pairs = ["--pairs", "0.4/0.4"]
    for n in "01":
        assert calibrate(monkeypatch, tmp_path, *pairs, "--shard", f"{n}/2") == 0
    before = {p: p.read_text() for p in (tmp_path / "out").glob("records*")}
    assert calibrate(monkeypatch, tmp_path, *pairs) == 0  # nothing is left to draw
    assert {p: p.read_text() for p in (tmp_path / "out").glob("records*")} == before
    (tmp_path / "out/records-0-of-1.jsonl").write_text("".join(before.values()))  # as twice drawn
    assert [line["prompts"] for line in table(read(tmp_path / "out"))] == [2]


def test_contestants_take_turns(tmp_path, monkeypatch):
    import analysis.measuring as module

    order, draw = [], module.draw

    def noted(pipeline, config, seed, **call):
        order.append(config.name if config.name == "none" else config.tau1)
        return draw(pipeline, config, seed, **call)

    monkeypatch.setattr(module, "draw", noted)
    assert calibrate(monkeypatch, tmp_path, "--pairs", "0.3/0.3", "0.4/0.4") == 0
    assert order == ["none", "none", 0.4, "none", 0.3, 0.4, 0.3, 0.4, "none"]  # the first three warm up


def test_calibration_without_a_reader_stops_before_drawing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    assert calibrate(monkeypatch, tmp_path, "--words") == 2
    assert "error: --words: reading words needs rapidocr" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_calibration_of_another_family(tmp_path, monkeypatch):
    """DiT draws classes, of one size, with a guidance of its own."""
    FAMILIES["dit"]()[0].save_pretrained(tmp_path / "dit")
    (tmp_path / "p.txt").write_text("207\n")
    command = ["--model", str(tmp_path / "dit"), "--prompts", str(tmp_path / "p.txt"), "--steps", "3"]
    assert main([*command, "--pairs", "9/9", "--out", str(tmp_path / "out")]) == 0
    (line,) = table(read(tmp_path / "out"))
    assert line["blocks"] > 1
    assert read(tmp_path / "out")[0]["settings"]["guidance"] == 4.0


def test_the_best_pair_is_fast_enough_and_closest():
    lines = [{"blocks": b, "psnr": p} for b, p in ((1.9, 60), (2.1, 40), (2.5, 45), (4, 30))]
    assert best(lines, 2.0)["psnr"] == 45
    assert best(lines, 3.0)["blocks"] == 4
    assert best(lines, 9.0) is None


@pytest.mark.parametrize("more", [[], ["--width", "32", "--heads", "2", "--double", "2", "--single", "3"]])
def test_overhead_is_measured(more, capsys):
    assert overhead.main(["--rounds", "1", "--burst", "2", "--threads", "1", *more]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["blocks of an all-hit step"] == 2
    assert {"uncached", "all hit", "structure miss", "disabled", "heads"} < report["milliseconds"].keys()
    more_operations = {name: row["tensor operations"] for name, row in report["overhead"].items()}
    assert 0 < more_operations["block_cache hit"] < more_operations["all hit"] < more_operations["all miss"]


def test_words_are_read_in_a_rendered_sign():
    import random

    from PIL import Image

    from analysis.measures.words import word_recall
    from analysis.tiny_flux.signs import SignSpec, render

    sign = SignSpec("red", "white", "square", "plain", "STOP", False)
    picture = Image.fromarray(render(sign, random.Random(0)))
    assert word_recall(["stop"], picture) == 1.0
    assert word_recall(["STOP", "GO"], picture) == 0.5
    assert word_recall([], picture) is None
