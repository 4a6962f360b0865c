"""The comparison over three models: values at a ratio, verdicts, and the page of the shipped records."""

import numpy as np
import pytest

from analysis import three_models as three


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


def test_a_verdict_needs_an_interval_beside_the_limit():
    both = NONE + rows("a", {20: 41.0}) + rows("b", {20: 40.0})
    assert three.above(three.gain(both, "a", "b"))[0] == three.YES
    assert three.above(three.gain(both, "b", "a"))[0] == three.NO
    assert three.above(three.gain(both, "a", "a"))[0] == three.OPEN
    assert three.above(three.gain(both, "a", "c"))[0] == three.NONE


def test_flicker_is_the_error_of_changes_not_of_brightness():
    clip = np.random.default_rng(0).integers(0, 200, (5, 8, 8, 3)).astype(np.uint8)
    assert three.flicker(clip + np.uint8(3), clip) == 0
    assert three.psnr(clip + np.uint8(3), clip) == pytest.approx(10 * np.log10(255**2 / 9))
    blinking = clip.copy()
    blinking[::2] += 3
    assert three.flicker(blinking, clip) == 3


def test_the_page_answers_every_claim_on_every_model(tmp_path):
    assert three.main(["--out", str(tmp_path)]) == 0
    page = (tmp_path / "three_models.md").read_text()
    for claim in three.CLAIMS:
        line = next(line for line in page.splitlines() if line.startswith(f"| {claim} |"))
        verdicts = [cell.split("**")[1] for cell in line.split("|")[2:-1]]
        assert len(verdicts) == len(three.RECORDS)
        assert set(verdicts) <= {three.YES, three.NO, three.OPEN, three.NONE}
