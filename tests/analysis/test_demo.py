"""The page of analysis.demo, in a real browser with real keys."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from analysis.demo import arguments, serve
from analysis.drawing.draw import Limits, draw
from analysis.drawing.studio import QUALITY, SPEED, asked
from analysis.measures.fidelity import fidelity
from h2cache import H2Config, PlanConfig, method_names
from h2cache.presets import find_preset
from tests.helpers.browser import opened, problem
from tests.helpers.toys import TINY

MISSING = problem() if importlib.util.find_spec("gradio") else "pip install -r requirements-demo.txt"
needs_browser = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@contextmanager
def browsing(*argv: str, folder: Any) -> Iterator[tuple[Any, list[str], list[str]]]:
    """A browser on the served page, what it asks for, and what goes wrong in it."""
    (folder / "empty.html").touch()
    blocks = serve(arguments(["--device", "cpu", *argv]), wait=False)
    try:
        with opened(folder / "empty.html") as (browser, requests, errors):
            browser.goto(blocks.local_url)
            yield browser, requests, errors
    finally:
        blocks.close()


def moved(browser: Any, slider: str, key: str) -> None:
    browser.get_by_label(f"range slider for {slider}").focus()
    browser.keyboard.press(key)


@needs_browser
def test_a_picture_is_drawn_and_follows_the_sliders(tmp_path, tiny):
    from playwright.sync_api import expect

    with browsing(folder=tmp_path) as (browser, requests, errors):
        cells, notes, steps = (browser.locator(f"#{name}") for name in ("numbers td", "notes", "steps"))
        expect(cells).to_have_count(15, timeout=30_000)
        assert cells.all_inner_texts()[3:6] == ["evaluations", "50", "10"]

        # The numbers are those that the library gives.
        prompt = browser.get_by_label("Prompt").input_value()
        call = {"prompt": prompt, "height": 128, "width": 128, "max_sequence_length": 24}
        uncached, cached = (
            draw(tiny, config, 0, num_inference_steps=50, **call)
            for config in (PlanConfig(evaluations=50), PlanConfig(speedup=5))
        )
        expected, true = cached.summary.expected_psnr[0], fidelity(cached.image, uncached.image)["psnr"]
        assert cells.nth(11).inner_text().startswith(f"{expected:.1f} dB")
        assert cells.nth(14).inner_text().startswith(f"{true:.1f} dB")
        assert steps.inner_text().endswith(", ".join(map(str, cached.summary.evaluated)))
        expect(browser.locator("#steps rect")).to_have_count(50)
        browser.set_viewport_size({"width": 1100, "height": 1000})
        browser.wait_for_function("[...document.images].every(image => image.naturalWidth == 128)")
        browser.screenshot(path=tmp_path / "demo.png", full_page=True)  # assets/demo.png is this one

        # Keys alone: the picture follows both sliders, the line moves, a method is chosen.
        moved(browser, "Speed", "End")
        expect(cells.nth(5)).to_have_text("5")
        moved(browser, "Quality", "Home")
        expect(browser.get_by_label(QUALITY)).to_be_checked()
        moved(browser, "Line between", "End")
        expect(browser.locator("#pair img").nth(1)).to_have_css("clip-path", "inset(0px 0px 0px 100%)")
        browser.get_by_label("Method").focus()
        browser.keyboard.press("Control+a")
        browser.keyboard.type("fewer")
        browser.keyboard.press("Enter")
        expect(browser.locator("#numbers th").nth(2)).to_have_text("fewer_steps")

        # What the model cannot draw is said in the words of run.py.
        browser.get_by_label("Prompt").fill('a marble sign that says "café"')
        browser.keyboard.press("Enter")
        expect(notes.locator("p")).to_contain_text(Limits.of(TINY).warnings('a marble sign that says "café"'))
        browser.get_by_label("Seed").fill("")
        browser.get_by_role("button", name="Draw").press("Enter")
        expect(notes).to_contain_text("error:")

        browser.set_viewport_size({"width": 400, "height": 800})
        assert browser.evaluate("document.documentElement.scrollWidth") <= 400
        assert browser.locator("#pair").bounding_box()["width"] > 300
        assert errors == []
        assert {url.split("/")[2].split(":")[0] for url in requests if url.startswith("http")} == {
            "127.0.0.1"
        }


@needs_browser
def test_a_picture_is_cancelled_at_the_next_step_and_another_can_be_drawn(tmp_path):
    from playwright.sync_api import expect

    with browsing("--steps", "600", folder=tmp_path) as (browser, _, errors):
        progress = browser.get_by_text("/600 steps")
        for round in range(2):
            if round:
                browser.get_by_role("button", name="Draw").press("Enter")
            expect(progress).to_be_visible(timeout=30_000)
            browser.get_by_role("button", name="Cancel").press("Enter")
            expect(progress).to_be_hidden()
            expect(browser.locator("#notes")).to_contain_text("cancelled before step")
            expect(browser.locator("#numbers td")).to_have_count(0)
        assert errors == []


def test_the_sliders_choose_the_nearest_measured_settings():
    assert asked(TINY, "plan", SPEED, 7.5, 40)[0] == PlanConfig(speedup=7.5)
    assert asked(TINY, "plan", QUALITY, 7.5, 40)[0] == PlanConfig(psnr=40)
    slow, fast = (asked(TINY, "h2cache", SPEED, speed, 40)[1] for speed in (2, 6))
    assert slow > fast
    config, mean, note = asked(TINY, "h2cache", QUALITY, 5, 40)
    assert isinstance(config, H2Config)
    assert mean >= 40
    assert f"tau1={config.tau1} tau2={config.tau2}" in note
    for method in {*method_names()} - {"none", "plan"}:
        assert asked(TINY, method, QUALITY, 5, 99)[0].name == method


def test_a_model_without_measured_settings_says_so():
    config, mean, note = asked("black-forest-labs/FLUX.1-dev", "h2cache", SPEED, 3, 40)
    assert config == find_preset("FLUX.1-dev", "h2cache").config
    assert mean is None
    assert "not measured on this model" in note
