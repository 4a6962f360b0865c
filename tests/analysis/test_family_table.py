"""The table of families and methods is what its script found."""

import json
from pathlib import Path

import pytest

from analysis import family_table
from analysis.measures.families import outcome as outcome_of
from analysis.settings import config_of
from analysis.tiny_families import FAMILIES
from h2cache import method_names


def test_a_pair_runs_or_is_refused_with_the_reason(tmp_path, capsys):
    command = ["--families", "z_image", "flux", "--methods", "h2cache", "teacache", "--out", str(tmp_path)]
    assert family_table.main(command) == 0
    report = json.loads((tmp_path / "families.json").read_text())
    cells = {family: row["methods"] for family, row in report["families"].items()}
    assert cells["z_image"]["h2cache"] == {"outcome": "runs"}
    assert cells["z_image"]["teacache"]["outcome"] == "refused"
    assert "modulated input" in cells["z_image"]["teacache"]["reason"]
    assert cells["flux"]["h2cache"] == {"outcome": "measured"}
    text = (tmp_path / "families.md").read_text()
    assert "| z_image | ZImagePipeline | runs | refused [1] |" in text
    assert "[1] teacache" in text
    capsys.readouterr()
    assert family_table.main(["--table", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == text.strip()


def test_a_pair_that_breaks_is_told_and_fails_the_command(tmp_path, monkeypatch):
    def broken(pipeline, *args):
        raise RuntimeError("boom")

    monkeypatch.setattr("h2cache.step_records", broken)
    assert family_table.main(["--families", "flux", "--methods", "none", "--out", str(tmp_path)]) == 1
    assert "FAILED [1]" in (tmp_path / "families.md").read_text()
    assert "boom" in (tmp_path / "families.md").read_text()


@pytest.mark.parametrize(
    ("raised", "outcome"),
    [
        (ValueError("shapes (3,) and (4,) do not match"), "FAILED"),
        (ValueError("speca keeps no text: lower its order"), "refused"),
        (MemoryError("speca keeps 3 GiB"), "refused"),
    ],
)
def test_only_a_refusal_counts_as_one(raised, outcome):
    pipeline, call = FAMILIES["flux"]()

    def broken(*_) -> None:
        raise raised

    pipeline.transformer.transformer_blocks[0].register_forward_pre_hook(broken)
    found, reason = outcome_of(pipeline, call, config_of("speca"))
    assert found == outcome
    assert str(raised) in reason


def test_the_table_says_the_command_that_made_it(tmp_path):
    command = ["--families", "flux", "--methods", "none", "--out", str(tmp_path)]
    assert family_table.main(command) == 0
    told = json.loads((tmp_path / "families.json").read_text())["command"]
    assert told == f"python -m analysis.family_table {' '.join(command)}"


@pytest.mark.parametrize("name", ["families.json", "families.md"])
def test_the_shipped_table_has_every_method(name):
    text = Path("assets/results", name).read_text(encoding="utf-8")
    assert all(method in text for method in method_names())
    assert "FAILED" not in text
