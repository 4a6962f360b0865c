"""Summaries and files."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import h2cache
from analysis.records import store
from h2cache import H2Config
from h2cache.records import StepRecord, summarise
from tests.helpers.toys import denoise


def record(step, outcome="miss", measure=None, stage="structure", run=3):
    return StepRecord(step, 1.0, "cond", stage, measure, 0.1, outcome, run, 3)


@given(st.lists(st.tuples(st.sampled_from(["hit", "forced", "miss"]), st.none() | st.floats(0)), max_size=40))
def test_a_summary_counts_every_record(rows):
    records = [record(n, outcome, measure) for n, (outcome, measure) in enumerate(rows)]
    summary = summarise("h2cache", records, 0, 0, "test")
    assert summary.steps == len(rows)
    assert sum(s.hits for s in summary.stages) == sum(o != "miss" for o, _ in rows)
    assert summary.blocks_run == 3 * len(rows)
    assert str(summary)
    for stage in summary.stages:
        if stage.percentiles:
            assert list(stage.percentiles) == pytest.approx(sorted(stage.percentiles))
            assert stage.thresholds == stage.percentiles[1:4]


def test_a_run_without_hits_is_warned_about(flux):
    h2cache.enable(flux, H2Config(tau1=1e-6, tau2=1e-6))
    assert "no step has been recorded" in str(h2cache.summary(flux))
    denoise(flux)
    text = str(h2cache.summary(flux))
    assert "nothing was reused: the smallest changes are about" in text
    assert "thresholds for about 25/50/75 % hits" in text


def test_a_run_that_always_starts_afresh_says_why(flux):
    from tests.helpers.toys import make_inputs

    h2cache.enable(flux, H2Config())
    for n in range(3):
        denoise(flux, 1, inputs=make_inputs(seed=n))
    assert "every step began a new request (last reason: another prompt came in)" in str(
        h2cache.summary(flux)
    )


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    store.write_atomically(path, b"old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["records.jsonl"]


def test_broken_lines_of_records_are_named_and_the_rest_is_used(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps({"key": "a", "x": 1}) + "\n{broken\n" + json.dumps({"key": "b"}) + "\n[1]\n")
    with pytest.warns(UserWarning, match=r"line (2|4) is left out") as caught:
        assert list(store.read_records(path)) == ["a", "b"]
    assert len(caught) == 2


def test_a_disk_without_room_is_refused(tmp_path):
    with pytest.raises(OSError, match=r"MiB are free on its disk, the run needs about \d+ MiB"):
        store.require_space(tmp_path, 10**9)


def test_infinite_settings_survive_json(tmp_path):
    settings = store.settings_of(H2Config(tau1=float("inf")))
    assert json.loads(json.dumps(settings, allow_nan=False))["tau1"] == "inf"


def test_the_key_of_a_run_depends_on_every_setting():
    assert store.run_key(a=1, b=2) == store.run_key(b=2, a=1)
    assert store.run_key(a=1, b=2) != store.run_key(a=1, b=3)


def test_images_are_compared_as_the_metrics_say():
    from analysis.measures.fidelity import fidelity

    grey, darker = Image.new("RGB", (32, 32), (128, 128, 128)), Image.new("RGB", (32, 32), (118, 118, 118))
    assert fidelity(grey, grey) == {"psnr": None, "ssim": 1.0, "identical": True}
    assert fidelity(grey, darker)["psnr"] == pytest.approx(28.131, abs=0.001)  # 20 log10(255 / 10)
