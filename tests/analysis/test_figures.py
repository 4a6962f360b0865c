"""The figure scripts: on the shipped records, on broken ones, and with an experiment of their own."""

import argparse
import contextlib
import csv
import gzip
import importlib
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from analysis import pareto, trace
from analysis.ablations.freeze import FreezeConfig
from analysis.ablations.summaries import FULL, PAPER, SummaryConfig
from analysis.drawing.contestants import contestants
from analysis.figures import style
from analysis.measures.spectrum import BANDS, error_spectrum, low_and_high, power
from analysis.records.compare import at, front, lines_of
from analysis.records.pfs import own_hits, undetermined
from analysis.records.saved import MAYBE, NUMBER, read_saved
from analysis.tiny_flux import signs
from h2cache import H2Config, enable, method_names, step_records
from tests.helpers.toys import generate

FIGURES = Path("assets/figures")
ROWS = Path("assets/results/tiny_flux_report/rows.jsonl.gz")
SCRIPTS = ("thresholds", "pfs", "separation", "trace", "pareto", "report", "schematic")


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """For what is said and counted: pictures are laid out and not painted."""
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


def script(name: str):
    return importlib.import_module(f"analysis.{name}").main


# The shipped records.


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_figure_comes_from_the_shipped_records(name, tmp_path):
    """The shipped numbers come out again; of the one without numbers, the same twice."""
    more = ["--metric", "psnr"] if name == "pareto" else []
    assert script(name)(["--out", str(tmp_path / "a"), *more]) == 0
    first = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    figures = {Path(n).stem for n in first if n.endswith(".png")}
    assert figures
    for figure in figures:
        assert {f"{figure}.pdf", f"{figure}.csv"} <= first.keys()
        assert b"/Type3" not in first[f"{figure}.pdf"]
        width = Image.open(tmp_path / "a" / f"{figure}.png").width
        assert abs(width / 300 - style.PAGE) < 0.1
    if name == "report":  # its figures are those of pareto, from other records
        return
    if name == "schematic":
        assert script(name)(["--out", str(tmp_path / "b"), *more]) == 0
        assert first == {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}
        return
    for file in first:
        if Path(file).suffix in (".csv", ".md") and file != "pareto.md":  # which has all metrics
            drawn, shipped = (parts(at / file) for at in (tmp_path / "a", FIGURES))
            # another processor may round the last digits another way
            near = [pytest.approx(p, 1e-5, 1e-9, nan_ok=True) if isinstance(p, float) else p for p in shipped]
            assert drawn == near, file


def parts(file: Path) -> list[str | float]:
    """The words and numbers of a table."""
    found: list[str | float] = []
    for text in re.split(r"([,|\s\[\]]+)", file.read_text(encoding="utf-8")):
        try:
            found.append(float(text))
        except ValueError:
            found.append(text)
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_first(name, capsys):
    with pytest.raises(SystemExit) as end:
        script(name)(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    module = importlib.import_module(f"analysis.{name}")
    assert module.__doc__.splitlines()[0] in "\n".join(text.splitlines()[:16])
    assert "--run" in text


def test_every_method_has_its_own_look():
    names = {*method_names(), *style.LOOKS}
    looks = [(style.look(n).colour, style.look(n).marker) for n in names]
    assert len(set(looks)) == len(looks)
    assert style.look("never heard of") == style.look("never heard of")


# Broken records.


def test_broken_lines_are_named_and_the_rest_is_used(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = [{"id": f"p{n}", "key": n, "x": n / 2, "y": None, "steps": 50} for n in range(6)]
    lines = [json.dumps(row) for row in good]
    lines[1] = lines[1][:-4]
    lines[3] = json.dumps(good[3] | {"x": "wide"})
    lines.insert(2, '{"id": "p9", "key": 9, "x": NaN, "y": null, "steps": 50}')
    lines.append(json.dumps({"another": "kind"}))
    lines.append(json.dumps(good[5]))
    lines.append(json.dumps(good[5] | {"key": 7, "steps": 20}))
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n[1]\n")
    saved = read_saved(
        [path],
        {"id": str, "x": NUMBER, "y": MAYBE},
        same={"steps": lambda row: row["steps"]},
        unique=("key",),
    )
    assert [row["key"] for row in saved.rows] == [0, 2, 4, 5]
    told = {int(c.split("line ")[1].split(":")[0]): c for c in saved.complaints}
    assert told.keys() == {2, 3, 5, 8, 9, 10, 11, 12}
    for number, reason in {2: "broken JSON", 3: "NaN", 5: "'x' is 'wide'", 8: "no 'id'", 9: "line 7",
                           10: "steps is 20", 11: "UTF-8", 12: "found list"}.items():  # fmt: skip
        assert reason in told[number]
    assert saved.exit_code() == 1


@given(seed=st.integers(0, 2**32), damage=st.sampled_from(["cut", "flip", "swap", "gzip"]))
@settings(max_examples=40, deadline=None)
def test_no_damage_gives_more_than_a_complaint(seed, damage, tmp_path_factory):
    rng = random.Random(seed)
    data = "".join(json.dumps({"id": n, "x": n * 0.5}) + "\n" for n in range(8)).encode()
    path = tmp_path_factory.mktemp("r") / ("r.jsonl.gz" if damage == "gzip" else "r.jsonl")
    if damage == "gzip":
        data = gzip.compress(data, mtime=0)
        data = data[: rng.randrange(len(data))]
    elif damage == "cut":
        data = data[: rng.randrange(len(data))]
    else:
        changed = bytearray(data)
        for _ in range(3):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        data = bytes(changed)
    path.write_bytes(data)
    with contextlib.suppress(ValueError):  # nothing is left
        saved = read_saved([path], {"id": int, "x": NUMBER}, unique=("id",))
        assert saved.rows
        assert all(row["x"] == row["id"] / 2 for row in saved.rows) or damage in ("flip", "swap")
        assert all(str(path) in complaint for complaint in saved.complaints)


BROKEN = {  # script: what it reads, and how it is told to
    "thresholds": ("assets/results/tiny_flux_grid/records-0-of-1.jsonl.gz", "--records", False),
    "separation": ("assets/results/tiny_flux_separation/records.jsonl.gz", "--records", False),
    "trace": ("assets/results/tiny_flux_traces/rows.jsonl.gz", "--records", True),
    "pareto": ("assets/results/tiny_flux_report/rows.jsonl.gz", "--records", True),
    "report": ("assets/results/tiny_flux_report/rows.jsonl.gz", "--folder", False),
    "pfs": ("assets/results/tiny_flux_pfs/steadiness.jsonl.gz", "--records", False),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.usefixtures("undrawn")
def test_a_script_names_the_broken_line_and_draws_the_rest(name, tmp_path, capsys):
    source, option, is_file = BROKEN[name]
    lines = gzip.decompress(Path(source).read_bytes()).decode().splitlines()
    lines.insert(3, lines[3][: len(lines[3]) // 2])  # as a killed writer leaves it
    lines.append('{"id": "x", "label": "stranger"}')
    path = tmp_path / Path(source).name.removesuffix(".gz")
    if name == "pfs":  # three files in a folder
        for other in ("cost.jsonl.gz", "decisions.jsonl.gz"):
            (tmp_path / other).write_bytes((Path(source).parent / other).read_bytes())
    path.write_text("\n".join(lines) + "\n")
    given = str(path if is_file else tmp_path)
    assert script(name)([option, given, "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert f"{path} line 4: broken JSON" in told
    assert f"{path} line {len(lines)}: " in told
    assert list((tmp_path / "out").glob("*.png"))
    path.write_text("nothing\n")
    assert script(name)([option, given, "--out", str(tmp_path / "out")]) == 2
    assert "no usable row" in capsys.readouterr().err
    path.unlink()
    assert script(name)([option, given, "--out", str(tmp_path / "out")]) == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["cost", "steadiness", "decisions"])
@pytest.mark.parametrize("damage", ["cut", "ragged", "lost"])
@pytest.mark.usefixtures("undrawn")
def test_pfs_draws_the_summaries_that_are_complete(part, damage, tmp_path, capsys):
    for path in Path("assets/results/tiny_flux_pfs").glob("*.jsonl.gz"):
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        if path.name.startswith(part):
            row = json.loads(lines[3])
            ragged = {"cost": "seconds", "steadiness": "clean", "decisions": "target"}[part]
            lines[3:4] = {
                "cut": [lines[3][:60]],
                "ragged": [json.dumps(row | {ragged: [[0.1], 0.2]})],
                "lost": [],
            }[damage]
        (tmp_path / path.name.removesuffix(".gz")).write_text("\n".join(lines) + "\n")
    code = script("pfs")(["--records", str(tmp_path), "--out", str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert code == (0 if (part, damage) == ("decisions", "lost") else 1)
    assert (f"{part}.jsonl line 4: " in told) == (damage != "lost")
    assert (tmp_path / "out" / "pfs.png").is_file()


# Arithmetic.


def test_the_spectrum_finds_where_an_error_is():
    y, x = np.mgrid[0:128, 0:128] / 128
    own = (
        0.5 + 0.1 * np.sin(2 * np.pi * 4 * x) + 0.1 * np.sin(2 * np.pi * 40 * y)
    )  # 4/64 and 40/64 of Nyquist

    def picture(values: np.ndarray) -> Image.Image:
        return Image.fromarray(np.repeat(np.uint8(values * 255)[..., None], 3, 2))

    coarse, fine = own + 0.05 * np.sin(2 * np.pi * 4 * x), own + 0.05 * np.sin(2 * np.pi * 40 * y)
    assert np.argmax(power(np.sin(2 * np.pi * 40 * y))) == int(40 / 64 * BANDS)
    low, high = (low_and_high(picture(p), picture(own)) for p in (coarse, fine))
    assert low["low"] == pytest.approx(0.25, rel=0.1)
    assert low["low"] > 100 * low["high"]
    assert high["high"] > 100 * high["low"]
    assert not error_spectrum(picture(own), picture(own)).any()


@given(st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_a_prompt_is_read_back_as_what_it_was_made_of(seed):
    rng = random.Random(seed)
    spec = signs.sample_spec(rng)
    assert signs.read_prompt(signs.prompt(spec, rng)) == spec


def test_other_prompts_are_not_read():
    assert signs.read_prompt("a photo of a cat") is None
    assert signs.read_prompt('a red red sign that says "A" on a blue background') is None


def test_the_front_holds_what_nothing_beats():
    found = [{"line": "m", "blocks_ratio": b, "quality": q} for b, q in ((1, 9), (2, 5), (3, 6), (4, 1))]
    assert [p["quality"] for p in front(found, lambda p: (p["blocks_ratio"], p["quality"]))] == [9, 6, 1]
    assert at(found, "m", 3.5) == 3.5
    assert at(found, "m", 5) is None


def test_settings_that_are_words_make_a_line_of_their_own():
    labels = ["h2cache tau1=0.1 tau2=inf", "h2cache predictor=taylor tau1=0.1", "clusca exact_fresh=true"]
    assert list(lines_of(labels).values()) == ["h2cache", "h2cache predictor=taylor", "clusca"]


@pytest.mark.parametrize("others", [[], ["h2cache (tiny_flux-5x)", "h2cache tau1=0.1 tau2=0.1"]])
def test_a_preset_looks_as_its_settings_do(others):
    found = lines_of(["block_cache (tiny_flux-block_cache)", *others])
    assert style.look(found["block_cache (tiny_flux-block_cache)"]).name == "Block Cache"
    assert all(style.look(found[other]).name == "H2-Cache" for other in others)


@pytest.mark.parametrize("name", ["pareto", "report"])
@pytest.mark.parametrize(("code", "expected"), [(KeyboardInterrupt, 130), (ValueError, 2), (1, 1), (0, 0)])
def test_the_experiments_exit_code_is_kept(name, code, expected, tmp_path, monkeypatch):
    def experiment(args: argparse.Namespace, command: str) -> int:
        if code not in (0, 1):
            raise code
        (tmp_path / "rows.jsonl").write_bytes(gzip.decompress(ROWS.read_bytes()))
        return code

    monkeypatch.setattr(pareto.experiment, "run", experiment)
    monkeypatch.setattr(pareto, "draw", lambda *_: None)
    monkeypatch.setattr("analysis.report.plots_of", lambda *_: [])
    assert script(name)(["--run", "--out", str(tmp_path)]) == expected
    assert any(tmp_path.iterdir()) == (code in (0, 1))


def test_all_contestants_are_of_known_methods_and_have_a_look_of_their_own():
    found = contestants(pareto.CONTESTANTS, "assets/tiny_flux", "tiny_flux")
    lines = set(lines_of([c.label for c in found]).values())
    assert {line.split(" ")[0] for line in lines} == set(method_names())
    looks = [style.LOOKS[line] for line in lines]
    assert len({(look.colour, look.marker) for look in looks}) == len({x.name for x in looks}) == len(looks)


def test_a_forced_hit_determines_no_threshold(tmp_path, capsys):
    rows = [
        {"summary": str(FULL), "target": [0.1, 0.2], "hits": {"structure": 30, "detail": d}} for d in (30, 31)
    ]
    assert own_hits(rows) == {"structure": 30, "detail": 0.5}
    assert undetermined(rows, (0.1, 0.2)) == ["detail"]
    rows[1]["hits"]["detail"] = 40
    assert undetermined(rows, (0.1, 0.2)) == []
    assert script("pfs")(["--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "| -0.06 [-0.29, +0.16] | detail |" in text
    assert "| average 2/12 | 0.106 | not determined |" in text
    steps = [int(row["step"]) for row in csv.DictReader((tmp_path / "pfs.csv").open()) if row["panel"] == "b"]
    assert (min(steps), max(steps)) == (3, 49)


@pytest.mark.usefixtures("undrawn")
def test_separation_counts_the_windows_apart_and_knows_the_uncached(tmp_path, capsys):
    assert script("separation")(["--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "| none | - | identical | 0 | 0 | - | 0.88 | 1.00 | 1.00 | 0.94 |" in text
    assert text.count("] | window |") == 5
    assert text.count("] | to the end, overlaps |") == 3


def grid_rows(words: dict[str, list[float | None]]) -> list[dict]:
    """Rows of a calibration with two prompts, uncached and at the pairs named."""
    shared = {"seconds": 1.0, "seconds_uncached": 2.0, "blocks": 100, "ssim": 0.9}
    rows = []
    for pair, read in words.items():
        for n, value in enumerate(read):
            tau1, _, tau2 = pair.partition("/")
            config = {"tau1": float(tau1), "tau2": float(tau2)} if tau2 else {}
            method, run = ("h2cache", 20 + int(100 * float(tau1))) if tau2 else ("none", 100)
            rows.append(shared | {"key": f"{pair} {n}", "id": f"p{n}", "method": method, "config": config,
                                  "blocks_run": run, "words": value, "psnr": 30.0 + run})  # fmt: skip
    return rows


@pytest.mark.usefixtures("undrawn")
def test_thresholds_gives_intervals_with_winners_and_no_row_goes_unsaid(tmp_path, capsys):
    rows = grid_rows({"none": [1.0] * 8, "0.1/0.1": [1.0, *[0.0] * 7], "0.2/0.1": [0.0] * 8})
    path = tmp_path / "records-0-of-1.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert script("thresholds")(["--records", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "| 2x fewer | words | 0.1 / 0.1 | 0.2 / 0.1 | +0.125 [+0.000, +0.375] |" in text
    path.write_text(
        "".join(json.dumps(r | {"words": None} if r["key"] == "0.1/0.1 3" else r) + "\n" for r in rows)
    )
    assert script("thresholds")(["--records", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "1 pictures of p3, whose words were read in another way" in capsys.readouterr().err


# Methods that only the analysis uses.


def test_a_frozen_stage_stands_still_and_nothing_else(tiny):
    uncached = generate(tiny, steps=6)
    enable(tiny, FreezeConfig("structure", 3, 3))
    assert generate(tiny, steps=6).equal(uncached)
    enable(tiny, FreezeConfig("detail", 2, 5))
    assert not generate(tiny, steps=6).equal(uncached)
    ran = {(r.step, r.stage): r.blocks_run for r in step_records(tiny)}
    assert [ran[n, "structure"] for n in range(6)] == [6] * 6
    assert [ran[n, "detail"] for n in range(6)] == [12, 12, 1, 1, 1, 12]
    for wrong in ({"stage": "all"}, {"first": 0}, {"first": 3, "last": 2}):
        with pytest.raises(ValueError, match=r"stage=|first=|last="):
            FreezeConfig(**wrong)


@pytest.mark.parametrize(("summary", "pools"), [(FULL, (2048, 384)), (PAPER, (32, 7))])
def test_with_the_papers_summary_it_is_the_papers_method(tiny, summary, pools):
    found = []
    for config in (
        SummaryConfig(0.4, 0.3, summary),
        H2Config(tau1=0.4, tau2=0.3, pool1=pools[0], pool2=pools[1]),
    ):
        enable(tiny, config)
        found.append((generate(tiny, steps=10), [(r.measure, r.outcome) for r in step_records(tiny)]))
    assert found[0][0].equal(found[1][0])
    assert found[0][1] == found[1][1]
    assert {"hit", "forced", "miss"} >= {outcome for _, outcome in found[0][1]} >= {"miss", "forced"}


# Experiments of their own, very small.


@pytest.mark.usefixtures("undrawn")
def test_separation_repeats_its_experiment(tmp_path, capsys, monkeypatch):
    from analysis import separation

    assert separation.spans(50) == [
        (1, 10),
        (10, 20),
        (20, 30),
        (30, 40),
        (40, 50),
        (30, 50),
        (20, 50),
        (10, 50),
    ]
    monkeypatch.setattr(separation, "spans", lambda steps: [(1, 2), (2, steps)])
    out = tmp_path / "s"
    assert script("separation")(["--run", "--limit", "1", "--steps", "5", "--out", str(out)]) == 0
    assert {p.name for p in out.iterdir()} >= {"records.jsonl", "about.json", "separation.png",
                                               "separation_pictures.png", "separation.md"}  # fmt: skip
    assert "\n| 1-1 | " in capsys.readouterr().out
    assert json.loads((out / "about.json").read_text())["settings"]["limit"] == 1


@pytest.mark.usefixtures("undrawn")
def test_pfs_repeats_its_measurements(tmp_path, capsys, monkeypatch):
    from analysis.ablations import pfs as pfs_runs

    for name, value in {"IMG": 64, "TXT": 16, "WIDTH": 96, "HEADS": 3, "TUNING": 1, "HALVINGS": 0}.items():
        monkeypatch.setattr(pfs_runs, name, value)
    monkeypatch.setattr(pfs_runs, "TARGETS", ((0.3, 0.2),))
    out = tmp_path / "p"
    assert script("pfs")(["--run", "--limit", "2", "--steps", "5", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "| full tensor |" in text
    assert "PFS (average 2/12) less full tensors" in text


@pytest.fixture
def random_clip(tmp_path) -> Path:
    """A CLIP of random weights: it judges nothing, but it is called as a real one."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    text = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision = text | {"image_size": 32, "patch_size": 8}
    tokenizer = CLIPTokenizer.from_pretrained("assets/tiny_flux/tokenizer")
    text |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    folder = tmp_path / "clip"
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of other seeds the judge may be so sure that it says 0 or 1
        CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("undrawn")
def test_thresholds_repeats_its_experiment(tmp_path, capsys, random_clip):
    out = tmp_path / "t"
    grid = ["--tau1", "0.2", "0.5", "--tau2", "0.1", "0.3", "--limit", "1", "--steps", "5"]
    assert script("thresholds")(["--run", *grid, "--clip", str(random_clip), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "4 pairs, 1 prompts" in text
    assert " CLIP-IQA |" in text
    data = list(csv.DictReader((out / "thresholds.csv").open()))
    assert {(row["tau1"], row["tau2"]) for row in data} == {
        (a, b) for a in ("0.2", "0.5") for b in ("0.1", "0.3")
    }
    assert all(0 < float(row["clip_iqa"]) < 1 for row in data)


def test_report_runs_the_experiment_first(tmp_path):
    options = ["--limit", "1", "--steps", "5", "--methods", "h2cache:tau1=0.4:tau2=0.3"]
    assert script("report")(["--run", *options, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert text.count("data:image/webp") == 2
    assert "trace_all" not in text
    assert "Measures and decisions at every step" in text
    assert "hold no trace" not in text


@pytest.mark.usefixtures("undrawn")
def test_trace_reads_what_run_py_writes(tmp_path, capsys):
    out = tmp_path / "t"
    options = ["--limit", "1", "--steps", "6", "--tau1", "0.4", "--tau2", "0.3"]
    assert script("trace")(["--run", *options, "--out", str(out)]) == 0
    assert "| structure | 6 |" in capsys.readouterr().out
    row = json.loads((out / "rows.jsonl").read_text())
    full = [{"step": 0, "timestep": 1.0, "branch": "cond", "stage": s, "measure": None, "threshold": None,
             "outcome": "miss", "blocks_run": 1, "blocks": 1} for s in ("structure", "detail")]  # fmt: skip
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(row | {"trace": full}) + "\n")
    assert trace.main(["--records", str(path), "--out", str(out)]) == 0
    path.write_text(json.dumps(row | {"trace": [{"step": 0}]}) + "\n")
    assert trace.main(["--records", str(path), "--out", str(out)]) == 2
    assert "empty or broken" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_trace_does_not_mix_settings(tmp_path, capsys):
    row = json.loads(gzip.decompress(trace.SHIPPED.read_bytes()).splitlines()[0])
    del row["label"]
    others = [row | {"key": f"k{n}", "config": row["config"] | {"tau1": 0.1}} for n in range(2)]
    short = row | {
        "key": "s",
        "trace": [row["trace"][0], {**row["trace"][1], "outcomes": "M", "measures": [1]}],
    }
    path = tmp_path / "rows.jsonl"
    rows = [row, row | {"key": "again"}, *others, short]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert script("trace")(["--records", str(path), "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "h2cache tau1=0.2 tau2=0.05, 2 requests" in said.out
    assert "2 requests of h2cache with tau1=0.1 tau2=0.05" in said.err
    assert "structure 50 steps, detail 1 steps" in said.err
    choice = ["--label", "tau1=0.1 tau2=0.05"]
    assert script("trace")(["--records", str(path), "--out", str(tmp_path), *choice]) == 0
    assert "h2cache tau1=0.1 tau2=0.05, 2 requests" in capsys.readouterr().out


def test_ctrl_c_and_a_limit_of_nothing_are_told_in_words(tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trace, "read", stop)
    assert script("trace")(["--out", str(tmp_path)]) == 130
    assert "stopped" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        script("trace")(["--run", "--limit", "0"])
    assert end.value.code == 2
    assert "0: a whole number from 1" in capsys.readouterr().err
