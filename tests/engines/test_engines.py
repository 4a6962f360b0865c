"""The page that shows how to add a family, taken at its word; and what all engines have in common."""

import re
import sys
from pathlib import Path

import pytest
import torch
from h2cache.baselines.teacache import TeaCacheConfig

import h2cache
import h2cache.engines as engines_package
from h2cache import H2Config
from h2cache.engines import engines, find_engine
from h2cache.engines.forms import Joined, OneStream, TwoStreams
from h2cache.program import Stream

INF = float("inf")
PAGE = Path("h2cache/engines/README.md")


def code(title: str) -> str:
    """The piece of code on the page that begins with the comment `title`."""
    return re.search(rf"```python\n# {title}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S).group(1)


@pytest.fixture
def sketch(tmp_path, monkeypatch):
    """The model of the page, with its engine in a folder that counts as one of the package's."""
    (tmp_path / "sketch.py").write_text(code("engine"), encoding="utf-8")
    monkeypatch.setattr(engines_package, "__path__", [*engines_package.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "h2cache.engines.sketch", raising=False)
    names: dict = {}
    exec(code("model"), names)
    torch.manual_seed(0)
    yield names["SketchTransformer"]().eval()
    sys.modules.pop("h2cache.engines.sketch", None)


def run(model, control=None, steps: int = 6) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 6, 8, generator=g), torch.randn(2, 3, 8, generator=g)
    out = []
    for n in range(steps):
        with torch.no_grad():
            out.append(model(x, torch.full((2,), 1 - n / steps), text, control=control))
        x = x - out[-1] / steps
    return out


@pytest.mark.parametrize("controlled", [False, True])
def test_the_worked_example_works(sketch, controlled):
    control = torch.ones(8) if controlled else None
    expected = run(sketch, control)
    h2cache.enable(sketch, H2Config(tau1=0.0, tau2=0.0))
    assert all(torch.equal(a, b) for a, b in zip(expected, run(sketch, control), strict=True))
    for config, first, later in (
        (H2Config(tau1=INF, tau2=INF), 9, 2),
        (H2Config(tau1=0.0, tau2=INF), 9, 3 + 1),  # a third, and the head of the rest
        (TeaCacheConfig(threshold=INF, coefficients=(0.0, 0.0, 0.0, 1.0, 0.0)), 9, 0),
    ):
        h2cache.enable(sketch, config, steps=6)
        run(sketch, control)
        counts = [0] * 6
        for record in h2cache.step_records(sketch):
            counts[record.step] += record.blocks_run
        assert counts[:5] == [first, *[later] * 4]
    h2cache.disable(sketch)
    assert all(torch.equal(a, b) for a, b in zip(expected, run(sketch, control), strict=True))


def test_control_is_added_fresh_in_skipped_steps(sketch):
    """The stored residual is without what the model itself adds: another control is felt at once."""
    h2cache.enable(sketch, H2Config(tau1=INF, tau2=INF))
    x, text, t = torch.randn(1, 6, 8), torch.randn(1, 3, 8), torch.ones(1)
    with torch.no_grad():
        sketch(x, t, text, control=torch.zeros(8))
        without = sketch(x, t - 0.1, text, control=torch.zeros(8))
        stronger = sketch(x, t - 0.2, text, control=torch.ones(8))
    assert (stronger - without).mean() > 6  # nine blocks, each followed by the control


def test_every_engine_names_classes_of_its_own():
    served = [name for engine in engines() for name in engine.serves]
    assert len(served) == len(set(served)) >= 9
    assert all({cut.name for cut in engine.cuts} == {"structure", "detail"} for engine in engines())


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(TypeError, match=r"no engine for Linear.*WanTransformer3DModel.*README"):
        find_engine(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("form", "output"),
    [
        (TwoStreams(text_first=True), lambda img, txt: (txt, img)),
        (TwoStreams(text_first=False), lambda img, txt: (img, txt)),
        (Joined(), lambda img, txt: torch.cat([txt, img], dim=1)),
    ],
)
def test_forms_read_what_they_write(form, output):
    img, txt = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
    read = form.read_output(output(img, txt), 4)
    assert torch.equal(read.img, img)
    assert torch.equal(read.txt, txt)
    written = form.write_output(Stream(img, txt))
    for a, b in zip(written, output(img, txt), strict=True):
        assert torch.equal(a, b)


def test_one_stream_has_no_text():
    x = torch.randn(1, 2, 3)
    form = OneStream()
    assert form.read_input((x, "text"), {}).txt is None
    assert form.write_output(form.read_output(x)) is x
    assert form.pass_through(x, "text") is x
