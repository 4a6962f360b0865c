"""The README's tables, commands and links are those of the repository: nobody typed a figure."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from analysis import pareto
from analysis.figures.experiment import narrow
from analysis.figures.pareto import at_once, by_speed
from analysis.records.compare import points

README = Path("README.md").read_text(encoding="utf-8")
PAGES = [
    "README.md", "h2cache/README.md", "analysis/README.md", "baselines/README.md",
    "h2cache/engines/README.md", "h2cache/engines/nunchaku.md", "assets/results/README.md",
    "assets/tiny_flux/README.md",
]  # fmt: skip


def test_the_experiments_table_is_that_of_the_shipped_rows():
    table = json.loads(Path("assets/results/experiment/table.json").read_text())["rows"]
    assert narrow(table) in Path("analysis/README.md").read_text(encoding="utf-8")


def test_the_methods_table_is_that_of_the_shipped_rows():
    rows = pareto.read(pareto.SHIPPED).rows
    measured = {metric: points(rows, metric) for metric in ("psnr", "words_read")}
    for lines, least in ((by_speed(measured), 4), (at_once(measured), 12)):
        table = [line for line in lines if line.startswith("|")]
        assert len(table) >= least + 2
        assert "\n".join(table) in README


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES)
def test_links_and_modules_are_there(page):
    text = Path(page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (Path(page).parent / target).exists(), target
    for module in re.findall(r"python -m ((?:analysis|tests)[\w.]*)", text):
        if not module.endswith("_METHOD") and "fit_METHOD" not in module:
            assert importlib.util.find_spec(module.rstrip(".")), module
    for file in re.findall(r"`((?:h2cache|analysis|baselines|assets|tests)/[\w/.]+\.\w+)`", text):
        example = Path(file).stem in ("every_other", "sketch")  # files that the reader is shown how to add
        assert example or Path(file).exists() or (Path(page).parent / file).exists(), file


def test_there_are_four_figures_at_the_most():
    assert len(re.findall(r"!\[", README)) <= 4
