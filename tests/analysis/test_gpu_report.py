"""The report for a GPU runs on a CPU too, and what it says is computed from its records."""

import json

import pytest

from analysis.gpu_report import __main__ as script
from analysis.gpu_report import costs, steps
from analysis.gpu_report.models import SKIPPING
from analysis.gpu_report.report import markdown


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report in a hurry: one round of times, and the profiler is for the uncached model only."""
    out, of_batch = tmp_path_factory.mktemp("report"), steps.of_batch

    def one_round(ctx, *batch):
        ctx.ends = 0.0  # no time for a second
        yield from of_batch(ctx, *batch)

    def waits(ctx):
        found = costs.waits(ctx)
        yield next(found)
        ctx.ends = 0.0
        yield from found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "of_batch", one_round)
        patch.setitem(script.SECTIONS, "waits", (waits, script.SECTIONS["waits"][1]))
        script.main(["--device", "cpu", "--small", "--minutes", "3", "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def rows(folder):
    lines = (folder / "records.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return {name: [row for row in found if row["section"] == name] for name in script.SECTIONS}


def test_it_leaves_one_small_folder(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["environment.json", "records.jsonl", "report.md"]
    about = json.loads((folder / "environment.json").read_text())
    assert about["date"]
    assert about["versions"]["torch"]


def test_every_section_says_how_it_ended_and_none_failed(rows):
    for name, found in rows.items():
        assert found[0]["outcome"] == "done" or "time" in found[0]["outcome"], name
        assert not [row for row in found if "error" in row], name


def test_switched_off_methods_are_the_uncached_model(rows):
    named = {row["method"] for row in rows["exact"] if "method" in row}
    assert named == {*SKIPPING, "uncached twice", "after disable"}
    assert all(row["equal"] for row in rows["exact"] if "equal" in row)


def test_every_kind_of_step_is_timed(rows):
    kinds = {(row["contestant"].split(",")[0], row["step"]) for row in rows["steps"] if "contestant" in row}
    assert {("plan", "computed"), ("plan", "skipped"), ("h2cache", "computed, skipped")} <= kinds
    assert {(name, kind) for name in SKIPPING for kind in ("computed", "skipped")} <= kinds
    assert all(row["repeats"] > 0 for row in rows["steps"] if "repeats" in row)


def test_a_goal_is_reached_by_its_value_alone(rows):
    goals = [row for found in rows.values() for row in found if "goal" in row]
    assert {row["section"] for row in goals} >= {"exact", "steps", "contract"}
    assert all(row["reached"] == (row["value"] <= row["limit"]) for row in goals)
    assert all(row["reached"] for row in goals if row["section"] in ("exact", "contract"))


def test_waits_are_counted_of_every_method(rows):
    uncached, *found = (row for row in rows["waits"] if "method" in row)
    assert "-1" not in uncached["of a request, profiler"]
    assert [row["method"] for row in found] == SKIPPING
    assert all(row["waits at each step"] == str([0] * 6) for row in found)  # a CPU waits for nothing


def test_compiled_blocks_are_compared_with_a_picture_that_repeats(rows):
    found = {row["what"]: row for row in rows["compiled"] if row.get("model") == "blocks" and "what" in row}
    assert found["uncached again"]["equal twice"]
    assert found["misses"]["equal to the compiled uncached picture"]


def test_memory_stated_and_counted_agree(rows):
    found = [row for row in rows["memory"] if "method" in row]
    assert [row["method"] for row in found] == SKIPPING
    assert all(0 < row["counted by the library, MiB"] <= row["stated, MiB"] for row in found)


def test_a_section_that_fails_is_recorded_and_the_next_goes_on(tmp_path, monkeypatch, capsys):
    def breaks(ctx):
        yield {"first": 1}
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(script.SECTIONS, "waits", (breaks, 0.1))
    options = ["--device", "cpu", "--small", "--sections", "waits", "memory", "--out", str(tmp_path)]
    assert script.main(options) == 1
    found = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert "no such kernel" in found[0]["traceback"]
    assert found[1] == {"section": "waits", "first": 1}
    assert found[2]["outcome"] == "done"
    assert "no such kernel" in (tmp_path / "report.md").read_text()


def test_a_section_without_time_is_named_and_not_run(tmp_path, capsys):
    options = ["--device", "cpu", "--small", "--sections", "memory", "--out", str(tmp_path)]
    assert script.main([*options, "--minutes", "0.01"]) == 1
    (line,) = (tmp_path / "records.jsonl").read_text().splitlines()
    assert "not run" in json.loads(line)["outcome"]


def test_a_goal_that_is_missed_is_a_no():
    about = {"versions": {}, "device_name": "card", "date": "today", "command": "it"}
    row = {"goal": "waits", "value": 2, "limit": 1, "unit": "", "reached": False}
    assert "| waits | 2 | 1 |  | NO |" in markdown(about, {"waits": ([row], {"outcome": "done"})})
