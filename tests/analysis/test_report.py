"""The page of a run, in a real browser with real keys."""

import gzip
import json
from pathlib import Path

import pytest
from PIL import Image

from analysis.figures.page import embed
from analysis.report import main
from tests.helpers.browser import opened, problem

SHIPPED = Path("assets/results/tiny_flux_report")
HOSTILE = '</script><script>document.title = "taken"</script><img src=x onerror="document.title=1">'

needs_browser = pytest.mark.skipif(problem() is not None, reason=str(problem()))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The shipped run with one hostile prompt and one picture missing."""
    folder = tmp_path_factory.mktemp("run")
    rows = [
        json.loads(line) for line in gzip.decompress((SHIPPED / "rows.jsonl.gz").read_bytes()).splitlines()
    ]
    for row in rows:
        if row["id"] == rows[0]["id"]:
            row["prompt"] = HOSTILE
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "images").mkdir()
    for path in sorted(SHIPPED.glob("images/*")):
        if path.stem != rows[1]["key"]:
            (folder / "images" / path.name).symlink_to(path.resolve())
    assert main(["--folder", str(folder), "--out", str(folder / "out")]) == 0
    return folder / "out" / "report.html"


def test_the_page_is_one_file_and_small(page):
    text = page.read_text()
    assert len(text) < 20 * 2**20
    assert text.count('class="card"') == 80
    assert HOSTILE not in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text


@needs_browser
def test_the_page_works_by_keyboard_and_asks_nobody(page):
    with opened(page) as (browser, requests, errors):
        assert errors == []
        assert {r.split(":")[0] for r in requests} <= {"file", "data"}
        assert len([r for r in requests if r.startswith("file:")]) == 1
        assert browser.evaluate("document.title").startswith("80 prompts")
        assert browser.evaluate("document.querySelectorAll('.card h3').length") == 80

        # The slider of the first card, reached by Tab alone and moved by keys.
        browser.evaluate("document.getElementById('lost').focus()")
        browser.keyboard.press("Tab")
        assert browser.evaluate("document.activeElement.type") == "range"
        cut = "document.activeElement.closest('.card').querySelector('.pair').style.getPropertyValue('--cut')"
        browser.keyboard.press("ArrowRight")
        assert browser.evaluate(cut) == "51%"
        browser.keyboard.press("End")
        assert browser.evaluate(cut) == "100%"
        browser.keyboard.press("Home")
        assert browser.evaluate(cut) == "0%"
        clip = "getComputedStyle(document.activeElement.closest('.card').querySelector('.cached')).clipPath"
        assert browser.evaluate(clip).startswith("inset(0px")
        drawn = "[...document.images].filter(i => !i.hidden && i.naturalWidth == 128).length"
        assert browser.evaluate(drawn) == 159  # one is missing

        # Orders, chosen from the list by keys.
        numbers = "[...document.querySelectorAll('.card')].map(c => data.rows[c.dataset.id][method.value])"
        browser.evaluate("order.focus()")
        browser.keyboard.press("ArrowDown")
        psnr = browser.evaluate(f"{numbers}.map(r => r.psnr)")
        assert browser.evaluate("order.value") == "psnr"
        assert psnr == sorted(psnr)
        browser.keyboard.press("ArrowDown")
        browser.keyboard.press("ArrowDown")
        words = browser.evaluate(f"{numbers}.map(r => r.words_read)")
        assert words == sorted(words)
        assert words[0] < 1

        # The table, sorted by its second heading with Enter.
        browser.evaluate("document.querySelectorAll('#summary th button')[2].focus()")
        browser.keyboard.press("Enter")
        column = "[...document.querySelectorAll('#summary tbody tr')].map(r => +r.children[2].dataset.value)"
        ratios = browser.evaluate(column)
        assert ratios == sorted(ratios)
        browser.keyboard.press(" ")
        assert browser.evaluate(column) == sorted(ratios, reverse=True)

        # A contestant whose pictures are not kept.
        browser.evaluate(
            "method.value = 'teacache threshold=0.15'; method.dispatchEvent(new Event('change'))"
        )
        assert browser.evaluate("document.querySelector('.card input').disabled") is True
        assert errors == []


def test_pictures_are_compressed_until_they_fit(tmp_path, capsys):
    paths = {}
    for n in range(6):
        paths[str(n)] = tmp_path / f"{n}.png"
        Image.effect_noise((256, 256), 90).convert("RGB").save(paths[str(n)])
    whole, told, broken = embed(paths, 4e6)
    assert (len(whole), broken) == (6, [])
    assert "as the folder has them" in told
    small, told, _ = embed(paths, 1.2e5)
    assert sum(map(len, small.values())) <= 1.2e5
    assert "compressed" in told
    with pytest.raises(ValueError, match="--megabytes"):
        embed(paths, 100)
    paths["2"].write_bytes(paths["2"].read_bytes()[:5000])
    some, _, broken = embed(paths, 4e6)
    assert len(some) == 5
    assert str(paths["2"]) in broken[0]
