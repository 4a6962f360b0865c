"""The example of baselines/README.md is a whole method: put into a folder, it works everywhere."""

import re
import sys
from pathlib import Path

import pytest
import torch

import h2cache
from analysis.settings import parse_settings
from h2cache import baselines
from tests.helpers.toys import denoise, generate, make_flux


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The code of the README as a file among the baselines."""
    text = Path("baselines/README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(code.splitlines()) <= 48
    (tmp_path / "every_other.py").write_text(code)
    monkeypatch.setattr(baselines, "__path__", [*baselines.__path__, str(tmp_path)])
    yield h2cache.find_method("every_other")
    sys.modules.pop("h2cache.baselines.every_other", None)


def test_it_is_found_and_set_by_name(example):
    assert "every_other" in h2cache.method_names()
    assert example(**parse_settings(example, ["interval=3"])).interval == 3
    with pytest.raises(ValueError, match="interval=0"):
        example(interval=0)


def test_it_holds_the_contract(example):
    model = make_flux()
    expected = denoise(model)
    h2cache.enable(model, example(interval=1))
    assert all(map(torch.equal, expected, denoise(model)))
    h2cache.enable(model, example(interval=3))
    first = denoise(model)
    assert h2cache.summary(model).hits == {"structure": 4, "detail": 4}
    assert h2cache.summary(model).block_ratio == 3
    assert all(map(torch.equal, first, denoise(model)))
    h2cache.disable(model)
    assert all(map(torch.equal, expected, denoise(model)))


def test_it_draws_with_the_embedded_model(example, tiny):
    exact = generate(tiny, steps=20)
    h2cache.enable(tiny, example())
    assert (generate(tiny, steps=20) - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_every_baseline_is_in_the_table():
    text = Path("baselines/README.md").read_text(encoding="utf-8")
    for path in Path("baselines").glob("*.py"):
        assert path.name == "__init__.py" or f"`{path.name}`" in text
