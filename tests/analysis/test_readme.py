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
from h2cache.tuned import Tuned

README = Path("README.md").read_text(encoding="utf-8")
PAGES = [
    "README.md", "h2cache/README.md", "analysis/README.md", "baselines/README.md",
    "h2cache/engines/README.md", "h2cache/engines/nunchaku.md", "assets/results/README.md",
    "assets/tiny_flux/README.md",
]  # fmt: skip


def test_the_experiments_table_is_that_of_the_shipped_rows():
    table = json.loads(Path("assets/results/experiment/table.json").read_text())["rows"]
    assert narrow(table) in Path("analysis/README.md").read_text(encoding="utf-8")


def cells(lines: list[str]) -> dict[str, list[str]]:
    """The rows of the first table by their first cell."""
    found = {}
    for line in lines:
        if line.startswith("|"):
            first, *others = (cell.strip() for cell in line.strip("|").split("|"))
            found[first] = others
        elif found:
            break
    return found


def test_the_methods_tables_are_those_of_the_shipped_rows():
    rows = pareto.read(pareto.SHIPPED).rows
    measured = {metric: points(rows, metric) for metric in ("psnr", "words_read")}
    assert "\n".join(line for line in by_speed(measured) if line.startswith("|")) in README
    flux, given = cells(at_once(measured)), cells(README[README.index("| method | FLUX") :].splitlines())
    pages = Path("assets/figures/three_models.md").read_text(encoding="utf-8")
    wan, dit = (cells(pages[pages.index(f"## {m}") :].splitlines()) for m in ("tiny_wan", "tiny_dit"))
    assert len(given) >= 19
    for name, (at_5x, on_wan, on_dit, *others) in given.items():
        if name not in ("method", "---"):
            assert [at_5x, *others] == flux[name]
            for value, table in ((on_wan, wan), (on_dit, dit)):
                assert value == table.get(name, ["-"])[0].split(" ")[0], name


def test_the_table_of_prompts_is_that_of_the_searches():
    searches = [Path(f"assets/results/tune_prompts/{n}.json") for n in (1, 2, 4)]
    page = Path("h2cache/README.md").read_text(encoding="utf-8")
    given = cells(page[page.index("| prompts searched on") :].splitlines())
    for name, count in (("5x", 10), ("8x", 6)):
        plans = [Tuned.load(path).plan(count) for path in searches]
        assert given[name] == [f"{plan.held_out.mean + 1e-9:.1f}" for plan in plans]
        assert all(plan.held_out.pictures == 24 for plan in plans)


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
