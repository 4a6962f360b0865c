"""What each method will keep is told before anything runs."""

import re
from pathlib import Path

import pytest

from analysis import cache_memory
from analysis.measures.held import check
from analysis.settings import config_of
from h2cache.method import Shape

PAGE = Path("baselines/README.md").read_text(encoding="utf-8")
LIBRARY = Path("h2cache/README.md").read_text(encoding="utf-8")
NAMES = {
    "H2-Cache": "h2cache",
    "plan": "plan",
    "The plan": "plan",
    "Block Cache": "block_cache",
    "TaylorSeer-Lite": "taylorseer_lite",
}


def mib(method: str, tokens: int = 4096) -> float:
    """Of FLUX.1-dev in bfloat16."""
    return config_of(method).bytes_needed(Shape((19, 38), tokens, 512, 3072, 64)) / 2**20


def written(value: float, like: str) -> str:
    """`value` with as many digits behind the point as `like` has."""
    return f"{value:.{len(like.partition('.')[2])}f}"


def test_the_table_of_small_pictures_is_what_the_command_prints(capsys):
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    (start,) = (n for n, row in enumerate(rows) if row[:2] == ["picture", "tokens"])
    header, *table = rows[start : start + 4]
    assert [row[0] for row in table] == ["512x512", "768x768", "1024x1024"]
    for _, tokens, *cells in table:
        assert cache_memory.main(["--img", tokens]) == 0
        lines = map(str.split, capsys.readouterr().out.splitlines())
        printed = {name: float(value) for name, value, *_ in lines}
        for name, cell in zip(header[2:], cells, strict=True):
            assert cell == written(mib(NAMES.get(name, name.lower()), int(tokens)), cell), (name, tokens)
            assert printed[NAMES.get(name, name.lower())] == pytest.approx(float(cell), abs=0.5)
    small = [mib("h2cache:window1=2:window2=12", tokens) for tokens in (1024, 2304)]
    usual = [mib("h2cache", tokens) for tokens in (1024, 2304)]
    assert "{:.0f} and {:.0f} MiB in place of {:.0f} and {:.0f}".format(*small, *usual) in PAGE


def test_each_methods_page_says_what_it_keeps():
    for section in PAGE.partition("## The methods one by one")[2].partition("\n## ")[0].split("### ")[1:]:
        name, *lines = section.splitlines()
        if name not in ("Chipmunk", "Fewer steps"):
            figures = re.findall(r"([\d.]+) MiB", " ".join(lines))
            value = mib(NAMES.get(name, name.lower()))
            assert any(written(value, figure) == figure for figure in figures), (name, value, figures)


@pytest.mark.parametrize(
    ("page", "words", "method"),
    [
        (PAGE, r"forecasts whole stages: ([\d.]+) MiB", "taylorseer:granularity=stage"),
        (PAGE, r"MiB in place of ([\d.]+) MiB, on every", "taylorseer"),
        (PAGE, r"add to the image tokens \(([\d.]+) MiB\)", "taylorseer_lite:lite_at=hidden"),
        (LIBRARY, r"the plan ([\d.]+) MiB", "plan"),
        (LIBRARY, r"H2-Cache ([\d.]+) MiB", "h2cache"),
        (LIBRARY, r"TaylorSeer ([\d.]+) MiB", "taylorseer"),
    ],
)
def test_other_figures_of_memory(page, words, method):
    (figure,) = re.findall(words, " ".join(page.split()))
    assert written(mib(method), figure) == figure


def test_memory_is_told_before_the_run(capsys):
    assert cache_memory.main(["--set", "taylorseer:order=2", "--free-gib", "5"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "3648.0 MiB" in lines["taylorseer"]
    assert "does not fit" not in lines["taylorseer"]
    assert "5472.0 MiB  does not fit" in lines["taylorseer:order=2"]
    with pytest.raises(SystemExit):
        cache_memory.main(["--set", "taylorseer:order=9"])


def test_what_is_in_memory_is_what_is_counted(capsys):
    """Byte for byte, but for latents that the pipeline holds too."""
    assert cache_memory.main(["--check", "flux", "--set", "speca:granularity=stage"]) == 0
    on_video, wrong = check(["h2cache", "hicache", "clusca"], ["hunyuan_video"])
    assert not wrong
    rows = [
        line.strip("| ").split(" | ")
        for line in (capsys.readouterr().out + on_video).splitlines()
        if line.startswith(("| flux |", "| hunyuan_video |"))
    ]
    same = {
        (family, method)
        for family, method, _, counted, alive, *_ in rows
        if abs(int(counted) - int(alive)) < 64
    }
    names = {"h2cache", "block_cache", "taylorseer", "hicache", "clusca", "speca:granularity=stage"}
    assert {("flux", name) for name in names} <= same
    assert {("hunyuan_video", name) for name in ("h2cache", "hicache", "clusca")} <= same


def test_what_is_larger_than_an_output_is_in_the_estimate(capsys):
    """FLUX Fill's latents are longer than its output, Klein's output has keys and values of its own."""
    hits = "easycache:warmup_steps=2:threshold=9:last_steps=0"
    found, wrong = check(["plan", "sencache", hits], ["flux_fill", "flux2_klein_kv"])
    assert not wrong, found
    assert found.count(hits) == 2


def test_a_table_of_all_families(capsys):
    assert cache_memory.main(["--models"]) == 0
    lines = {
        line.split(" | ")[0]: line.strip(" |").split(" | ") for line in capsys.readouterr().out.splitlines()
    }
    assert lines["| taylorseer"][1] == "3648.0"  # FLUX.1
    assert lines["| taylorseer"][-1] == "-"  # Inf-DiT does not divide into modules
    assert lines["| h2cache"][-1] == "1280.0"  # two residuals of 640 MiB


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (["--width", "0"], "--width: 0: a whole number from 1"),
        (["--out-channels", "0"], "--out-channels: 0: a whole"),
        (["--double", "0", "--single", "0"], "one block at least"),
        (["--free-gib", "-1"], "--free-gib: -1"),
    ],
)
def test_sizes_that_cannot_be_are_refused(capsys, broken, message):
    with pytest.raises(SystemExit):
        cache_memory.main(broken)
    assert message in capsys.readouterr().err
