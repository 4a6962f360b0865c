"""The comparison over three models: values at a ratio, verdicts, and the page of the shipped records."""

import json

import numpy as np
import pytest

from analysis import three_models
from analysis.measures import strips
from analysis.records import claims as three
from analysis.records.models import RECORDS


def rows(line: str, psnr: dict[int, float], pictures: int = 8) -> list[dict]:
    """Pictures by one line at so many of 100 blocks; picture n is n tenths of a dB better."""
    return [
        {
            "id": str(n), "label": f"{line} {run}", "line": line, "method": line, "blocks_run": run,
            "blocks": 100, "psnr": None if line == "none" else value + n / 10, "right": 1.0,
        }
        for run, value in psnr.items()
        for n in range(pictures)
    ]  # fmt: skip


NONE = rows("none", {100: 0.0})


def test_values_lie_between_the_nearest_settings_picture_by_picture():
    found = three.values(NONE + rows("a", {50: 60.0, 25: 40.0, 10: 20.0}), "a", 3.0)
    assert found == pytest.approx({str(n): 50 + n / 10 for n in range(8)})


def test_a_setting_near_the_ratio_is_taken_as_it_is():
    found = three.values(NONE + rows("a", {50: 60.0, 20: 40.0}), "a", 5.1)
    assert found == pytest.approx({str(n): 40 + n / 10 for n in range(8)})


def test_beyond_what_was_measured_there_is_no_value():
    assert three.values(NONE + rows("a", {50: 60.0, 25: 40.0}), "a", 5.0) == {}


@pytest.mark.parametrize("method", [None, "plan"])
def test_a_run_without_uncached_pictures_is_not_collected(tmp_path, capsys, method):
    if method:
        row = tmp_path / "runs/plan/rows/1.json"
        row.parent.mkdir(parents=True)
        row.write_text(json.dumps({"id": "1", "label": method, "method": method}))
    assert three_models.main(["--collect", str(tmp_path), "--model", "tiny_dit", "--beside", "tuned"]) == 2
    assert "no uncached picture" in capsys.readouterr().err


def test_a_verdict_needs_an_interval_beside_the_limit():
    both = NONE + rows("a", {20: 41.0}) + rows("b", {20: 40.0})
    assert three.above(three.gain(both, "a", "b"))[0] == three.YES
    assert three.above(three.gain(both, "b", "a"))[0] == three.NO
    assert three.above(three.gain(both, "a", "a"))[0] == three.OPEN
    assert three.above(three.gain(both, "a", "c"))[0] == three.NONE


def test_a_claim_falls_back_to_the_ratio_that_was_measured():
    slow = NONE + rows("a", {30: 42.0}) + rows("b", {30: 40.0})
    assert three.better(slow, "a", "b") == (three.NONE, "")
    slow = NONE + rows("a", {33: 42.0}) + rows("b", {33: 40.0})
    verdict, text = three.better(slow, "a", "b")
    assert verdict == three.YES
    assert text.endswith("dB at 3x")


def test_stages_differ_where_freezing_the_second_spoils_more_of_the_high_frequencies():
    def frozen(stage: str, high: float) -> list[dict]:
        span = {"first": 1, "last": 10, "steps": 50}
        return [{"id": str(n), "stage": stage, "low": 1.0, "high": high * (n + 1), **span} for n in range(8)]

    assert three.stages_differ(frozen("structure", 1.0) + frozen("detail", 2.0))[0] == three.YES
    assert three.stages_differ(frozen("structure", 2.0) + frozen("detail", 1.0))[0] == three.NO
    assert three.stages_differ([]) == (three.NONE, "")


def test_flicker_is_the_error_of_changes_not_of_brightness():
    clip = np.random.default_rng(0).integers(0, 200, (5, 8, 8, 3)).astype(np.uint8)
    assert strips.flicker(clip + np.uint8(3), clip) == 0
    assert strips.psnr(clip + np.uint8(3), clip) == pytest.approx(10 * np.log10(255**2 / 9))
    blinking = clip.copy()
    blinking[::2] += 3
    assert strips.flicker(blinking, clip) == 3


def test_the_page_answers_every_claim_on_every_model(tmp_path):
    assert three_models.main(["--out", str(tmp_path)]) == 0
    page = (tmp_path / "three_models.md").read_text()
    for claim in [*three.CLAIMS, three.SEPARATION]:
        line = next(line for line in page.splitlines() if line.startswith(f"| {claim} |"))
        verdicts = [cell.split("**")[1] for cell in line.split("|")[2:-1]]
        assert len(verdicts) == len(RECORDS)
        assert set(verdicts) <= {three.YES, three.NO, three.OPEN, three.NONE}
