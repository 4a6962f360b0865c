"""The comparison at equal cost, and the memory table."""

import json

import pytest

from analysis import cache_memory, compare_methods
from analysis.compare_methods import at_ratio, ladder_points, markdown


def point(ratio: float, psnr: float, words: float | None = 1.0) -> dict:
    return {"ratio": ratio, "psnr": psnr, "worst": psnr - 2, "words": words, "speed_up": ratio, "bytes": 100}


def test_figures_lie_between_the_nearest_settings_and_nowhere_else():
    points = [point(2, 50), point(4, 40), point(8, 20, None)]
    assert at_ratio(points, 2)["psnr"] == 50
    assert at_ratio(points, 8**0.5)["psnr"] == pytest.approx(45)
    assert at_ratio(points, 4)["words"] == 1
    assert at_ratio(points, 1.9) is None
    assert at_ratio(points, 9) is None
    text = markdown({"one": points, "other": points[:1]})
    assert text.splitlines()[2].startswith("| one | 50.0 | 44.2 | 40.0 | 33.6 |")
    assert text.splitlines()[3].startswith("| other | - | - |")  # one setting: only at its own ratio


def test_points_are_means_over_prompts_against_the_uncached():
    def row(label, name, blocks, psnr):
        return {
            "label": label,
            "method": label,
            "id": name,
            "blocks_run": blocks,
            "psnr": psnr,
            "words_read": None,
            "seconds": blocks / 10,
            "bytes_held": blocks,
        }

    rows = [row("none", "a", 100, None), row("none", "b", 100, None)]
    rows += [row("x", "a", 50, 30), row("x", "b", 30, 40), row("same", "a", 100, None)]
    (found,) = ladder_points(rows, ["x", "same"])
    assert found["ratio"] == 200 / 80
    assert (found["psnr"], found["worst"], found["prompts"], found["bytes"]) == (35, 30, 2, 50)
    assert found["speed_up"] == pytest.approx((2 + 10 / 3) / 2)


def test_one_command_draws_table_and_plot(tmp_path, monkeypatch, capsys):
    ladders = {"Block Cache": ["block_cache:threshold=0.4,0.8"], "H2-Cache": ["h2cache:ahead=true:tau1=0.05"]}
    monkeypatch.setattr(compare_methods, "LADDERS", ladders)
    settings = ["--limit", "1", "--steps", "6", "--no-words", "--device", "cpu", "--out", str(tmp_path)]
    assert compare_methods.main(settings) == 0
    assert "| Block Cache |" in capsys.readouterr().out
    methods = json.loads((tmp_path / "methods.json").read_text())
    assert [p["prompts"] for p in methods["methods"]["Block Cache"]] == [1, 1]
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 4  # the uncached one too
    assert (tmp_path / "methods.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        compare_methods.main(["--only", "nope"])


def test_every_ladder_is_made_of_known_methods_and_settings():
    from analysis.experiment import contestants

    for texts in compare_methods.LADDERS.values():
        assert len(contestants(texts, "assets/tiny_flux", "tiny_flux")) > 4


def test_memory_is_told_before_the_run(capsys):
    assert cache_memory.main(["--set", "taylorseer:order=2", "--free-gib", "5"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "4104.0 MiB" in lines["taylorseer"]
    assert "does not fit" not in lines["taylorseer"]
    assert "6156.0 MiB  does not fit" in lines["taylorseer:order=2"]
    with pytest.raises(SystemExit):
        cache_memory.main(["--set", "taylorseer:order=9"])
