"""The experiment as a user types it, killed, divided over processes, and its arithmetic."""

import csv
import json
import random
import socket
import sys
import time

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from analysis.drawing.contestants import contestants
from analysis.drawing.draw import Limits, draw
from analysis.drawing.prompts import read_prompts
from analysis.experiment import main
from analysis.figures.experiment import markdown
from analysis.measures.fidelity import ClipIqa, fidelity, gmsd, more_fidelity, to_tensor
from analysis.measures.flops import CPU_ATTENTION, count_forward, count_step
from analysis.records import store
from analysis.records.compare import bootstrap, lines
from analysis.records.published import published, published_markdown
from analysis.tiny_families import FAMILIES
from h2cache import find_method
from tests.helpers.served import ended, started

METHODS = ["h2cache:tau1=0.3:tau2=0.3,inf", "block_cache:threshold=0.2"]


def arguments(out, *more, steps: int = 6, limit: int = 2) -> list[str]:
    return ["--out", str(out), "--steps", str(steps), "--limit", str(limit), "--methods", *METHODS, *more]


def facts(out) -> list[dict]:
    """What must not depend on how often a run was stopped: everything but times and memory."""
    table = json.loads((out / "table.json").read_text())["rows"]
    clock = ("seconds", "speed_up", "peak")
    return [{k: v for k, v in line.items() if not k.startswith(clock)} for line in table]


def test_the_experiment_makes_its_table(tmp_path, capsys):
    assert main(arguments(tmp_path, "--no-words")) == 0
    text = capsys.readouterr().out
    assert "| none | 108 | 1.00x |" in text
    assert "CLIP-IQA is null: no CLIP weights" in text
    assert "MS-SSIM is null" in text
    table = json.loads((tmp_path / "table.json").read_text())
    none, tight, loose, block = table["rows"]
    assert [x["label"] for x in table["rows"]] == [
        "none",
        "h2cache tau1=0.3 tau2=0.3",
        "h2cache tau1=0.3 tau2=inf",
        "block_cache threshold=0.2",
    ]
    assert none["identical"] == none["prompts"] == 2
    assert none["psnr"] is None
    assert none["bytes_held"] == 0
    assert 1 <= tight["blocks_ratio"] <= loose["blocks_ratio"]
    assert 0 < block["tflops"] <= none["tflops"]
    assert block["bytes_held"] > 0
    assert none["words_read"] is None
    assert table["published"][3]["speed_up"] == 5.08
    with open(tmp_path / "table.csv", newline="") as file:
        assert [line["label"] for line in csv.DictReader(file)] == [x["label"] for x in table["rows"]]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all(0 < row["seconds_steps"] < row["seconds"] for row in rows)
    assert Image.open(tmp_path / "compare.png").width > 3 * 192

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.*")}
    assert main(arguments(tmp_path, "--no-words")) == 0  # nothing is done twice
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*.*")}
    assert {p: t for p, t in after.items() if p.name != "settings.json"} == {
        p: t for p, t in before.items() if p.name != "settings.json"
    }
    assert main(arguments(tmp_path, "--no-words", steps=2, limit=1)) == 0  # another setting, another folder
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_killed_at_random_moments_it_ends_as_if_undisturbed(tmp_path):
    """The long form of this, with ten kills, is in assets/results/README.md."""
    moments = random.Random(0)
    for _ in range(1):
        process = started(main, arguments(tmp_path / "killed", "--no-words", steps=4), log=tmp_path / "log")
        end = time.monotonic() + 120
        rows = tmp_path / "killed/runs"
        before = len(list(rows.glob("*/rows/*.json")))
        while time.monotonic() < end and len(list(rows.glob("*/rows/*.json"))) < before + 2:
            time.sleep(0.02)
        time.sleep(moments.random() * 0.3)
        process.kill()
        process.join()
        finished = list(rows.glob("*/rows/*.json"))
        assert len(finished) >= before + 2
        for path in finished:
            row = json.loads(path.read_text())
            Image.open(path.parent.parent / "images" / f"{row['key']}.png").load()
    half = store.temporary(rows / finished[0].parts[-3] / "rows/half.json", process=999999999)
    half.write_text("{")  # as a kill may leave it
    assert main(arguments(tmp_path / "killed", "--no-words", steps=4)) == 0
    assert not list(rows.rglob(".*"))
    assert main(arguments(tmp_path / "whole", "--no-words", steps=4)) == 0
    assert facts(tmp_path / "killed") == facts(tmp_path / "whole")


def test_two_processes_divide_the_prompts(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = arguments(tmp_path / "two", "--no-words", steps=3, limit=2)
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    processes = [
        started(main, command, log=log, RANK=str(n), LOCAL_RANK=str(n), **meet)  # as torchrun does
        for n, log in enumerate(logs)
    ]
    assert ended(processes, 300) == [0, 0], [log.read_text()[-2000:] for log in logs]
    assert [log.read_text().count("| none |") for log in logs] == [1, 0]
    rows = [json.loads(line) for line in (tmp_path / "two/rows.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert json.loads((tmp_path / "two/table.json").read_text())["settings"]["processes"] == 2
    assert main(arguments(tmp_path / "one", "--no-words", steps=3, limit=2)) == 0
    assert facts(tmp_path / "two") == facts(tmp_path / "one")


def test_what_fails_is_told_and_the_rest_is_kept(tmp_path, capsys, monkeypatch):
    import analysis.measuring as measuring

    draw, broken = measuring.draw, []

    def sometimes(pipeline, config, seed, **call):
        if "CARP" in call["prompt"] and config.name == "block_cache" and not broken:
            broken.append(True)
            raise RuntimeError("out of memory")
        return draw(pipeline, config, seed, **call)

    monkeypatch.setattr(measuring, "draw", sometimes)
    command = arguments(tmp_path, "--no-words", steps=2)
    assert main(command) == 1
    assert "out of memory" in capsys.readouterr().err
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 7
    assert main(command) == 0
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["--methods", "nope"], "unknown method 'nope'"),
        (["--methods", "h2cache:tau3=1"], "cannot set 'tau3=1'"),
        (["--methods", "h2cache:tau1=-1"], "tau1=-1.0 is out of range"),
        (["--height", "256"], "height=256"),
        (["--prompts", "missing.jsonl"], "missing.jsonl"),
        (["--model", "nowhere/"], "no model folder"),
    ],
)
def test_bad_input_is_named(tmp_path, capsys, bad, message):
    assert main(["--out", str(tmp_path), "--limit", "1", *bad]) == 2
    assert message in capsys.readouterr().err


def test_contestants_multiply_their_values():
    found = contestants(
        ["none", "h2cache:tau1=0.1,0.2:tau2=0.3,0.4", "fewer_steps"], "assets/tiny_flux", None
    )
    assert [c.label for c in found] == [
        "none",
        "h2cache tau1=0.1 tau2=0.3",
        "h2cache tau1=0.1 tau2=0.4",
        "h2cache tau1=0.2 tau2=0.3",
        "h2cache tau1=0.2 tau2=0.4",
        "fewer_steps",
    ]
    assert (found[4].config.tau1, found[4].config.tau2) == (0.2, 0.4)


def test_the_prompt_files_are_what_they_say():
    from pathlib import Path

    limits = Limits.of("assets/tiny_flux")
    for name in ("cute80", "cute80_tiny"):
        prompts = read_prompts(Path(f"assets/prompts/{name}.jsonl"))
        assert len(prompts) == len({p.text for p in prompts}) == 80
        for prompt in prompts:
            for word in prompt.words:
                assert word in prompt.text
            if name == "cute80_tiny":
                assert limits.warnings(prompt.text) == []


def write_prompts(folder, *words: str):
    path = folder / "p.jsonl"
    text = 'a red round sign that says "{}" on a white background'
    path.write_text("".join(json.dumps({"prompt": text.format(w), "words": [w]}) + "\n" for w in words))
    return path


def test_without_a_reader_the_table_is_made_and_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)  # as after `pip install -r requirements.txt`
    prompts = write_prompts(tmp_path, "GO")
    command = [
        "--prompts",
        str(prompts),
        "--out",
        str(tmp_path / "out"),
        "--steps",
        "2",
        "--methods",
        "h2cache",
    ]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "words are not read back: reading words needs rapidocr" in captured.err
    assert "No words were read: reading words needs rapidocr" in captured.out
    monkeypatch.delitem(sys.modules, "rapidocr")
    assert main(command) == 0  # now they are read, and nothing is drawn again
    assert "words read %" in capsys.readouterr().out
    prompts.write_text(prompts.read_text().replace('["GO"]', '["GO", "QQ"]'))
    assert main(command) == 0  # other words are wanted: read again
    rows = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    assert all(row["words_read"] <= 0.5 for row in rows)


def test_a_judge_that_cannot_be_loaded_is_refused_before_drawing(tmp_path, capsys):
    assert main(arguments(tmp_path / "out", "--clip", str(tmp_path))) == 2
    assert "no CLIP weights in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_embedded_model_is_known_however_it_is_written(tmp_path, capsys):
    more = ["--model", "./assets/tiny_flux", "--no-words", "--limit", "1", "--steps", "3"]
    assert main(["--out", str(tmp_path), *more]) == 0
    captured = capsys.readouterr()
    assert "block_cache" in captured.out
    assert "does not know" not in captured.err  # its own prompts
    assert "at 50 steps and 128x128; here: 3 steps" in captured.err
    row = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    assert row["id"] == "tiny001"


def test_prompts_that_the_model_cannot_draw_are_warned_about(tmp_path, capsys):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a photograph of a lion\n")
    assert main(arguments(tmp_path / "out", "--prompts", str(prompts), "--no-words", steps=2)) == 0
    assert "this model does not know: photograph, of, lion" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "prompt", "more"),
    [
        ("dit", "207", []),
        (
            "qwen_image",
            "a sign",
            ["--negative-prompt", " ", "--true-cfg", "2", "--height", "32", "--width", "32"],
        ),
    ],
)
def test_other_families_are_compared(tmp_path, family, prompt, more):
    FAMILIES[family]()[0].save_pretrained(tmp_path / family)
    prompts = tmp_path / "p.txt"
    prompts.write_text(f"{prompt}\n")
    command = [
        "--model",
        str(tmp_path / family),
        "--prompts",
        str(prompts),
        "--methods",
        "h2cache:tau1=9:tau2=9",
    ]
    assert main([*command, *more, "--steps", "3", "--no-words", "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/table.json").read_text())
    none, cached = report["rows"]
    assert 0 < cached["tflops"] < none["tflops"]
    if more:
        assert report["settings"]["true_cfg"] == 2
    else:
        assert report["settings"]["guidance"] == 4.0  # the pipeline's own


# Arithmetic.


def test_a_step_of_two_branches_is_counted_once_for_each():
    """Wan calls its transformer twice a step: a whole uncached request is what PyTorch counts for it."""
    pipeline, call = FAMILIES["wan"]()
    cost = count_step(pipeline, call)
    drawn = draw(pipeline, find_method("none")(), 0, **call, num_inference_steps=3)
    assert len({r["branch"] for r in drawn.trace}) == 2
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        pipeline(**call, num_inference_steps=3, output_type="latent")
    counts = counter.get_flop_counts()
    counted = sum(counts[type(pipeline.transformer).__name__].values())
    assert cost.tflops(drawn.trace) * 1e12 == pytest.approx(counted)


def row(identity: str, label: str, seconds: float, **more) -> dict:
    """A finished row, as the experiment writes it."""
    facts = dict.fromkeys(("ms_ssim", "lpips", "words_read", "clip_iqa", "seconds_steps", "clip_iqa_reason"))
    facts |= {"blocks_run": 10, "tflops": 1.0, "psnr": None, "ssim": 1.0, "identical": True, "gmsd": 0.0}
    facts |= {"peak_bytes": 1, "peak_kind": "resident", "bytes_held": 0, "config": {}, "method": label}
    return facts | {"id": identity, "label": label, "seconds": seconds} | more


def test_a_contestant_without_a_common_prompt_has_no_line():
    rows = [row("a", "none", 2.0), row("a", "h2cache", 1.0), row("b", "teacache", 1.0)]
    rows.insert(1, row("c", "none", 2.0))
    found = lines(rows)
    assert [line["label"] for line in found] == ["none", "h2cache"]
    assert "teacache has no line" in markdown(found, rows)
    assert "h2cache is over 1 prompts" in markdown(found, rows)


def test_the_interval_of_a_median_is_of_the_median():
    """Four of five prompts are 2x, one 100x: a mean's interval would leave 2 behind."""
    ids = "abcde"
    rows = [row(i, "none", 2.0) for i in ids] + [row(i, "h2cache", 1.0) for i in ids[:4]]
    rows.append(row("e", "h2cache", 0.02))
    line = lines(rows)[1]
    assert line["speed_up"] == line["speed_up_interval"][0] == 2.0
    assert bootstrap([2.0] * 4 + [100.0], np.median).mean == 2.0
    assert "2.00x [2.00, " in markdown(lines(rows), rows)


def test_identical_pictures_are_counted():
    different = {"identical": False, "psnr": 40.0, "ssim": 0.9}
    rows = [row(i, "none", 2.0) for i in "ab"] + [
        row("a", "h2cache", 1.0),
        row("b", "h2cache", 1.0, **different),
    ]
    text = markdown(lines(rows), rows).splitlines()
    cells = dict(zip(text[0].split(" | "), text[3].split(" | "), strict=True))
    assert cells["identical"] == "1"
    all_differ = [r | different if r["label"] != "none" else r for r in rows]
    assert "identical |" not in markdown(lines(all_differ), all_differ).splitlines()[0]


def test_what_others_published_says_model_and_data():
    text = published_markdown(published())
    assert "| FLUX.1-dev | COCO | h2cache | journal abstract, COCO | - |" in text
    assert "the source states no size" in text


def test_operations_of_flux_dev_are_the_known_ones():
    """74.385 TFLOP a step, 1.3048 and 1.3047 a block, at 1024x1024 and 512 text tokens."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
        call = {
            "hidden_states": torch.empty(1, 4096, 64),
            "encoder_hidden_states": torch.empty(1, 512, 4096),
            "pooled_projections": torch.empty(1, 768),
            "timestep": torch.empty(1),
            "guidance": torch.empty(1),
            "img_ids": torch.empty(4096, 3),
            "txt_ids": torch.empty(512, 3),
        }
        cost = count_forward(model, lambda: model(**call))
    assert cost.blocks["structure"] == pytest.approx(1.3048e12, rel=1e-4)
    assert cost.blocks["detail"] == pytest.approx(1.3047e12, rel=1e-4)
    one_step = [
        {"branch": "cond", "step": 0, "stage": stage, "blocks_run": n}
        for stage, n in (("structure", 19), ("detail", 38))
    ]
    assert cost.tflops(one_step) == pytest.approx(74.385, rel=1e-4)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_an_interval_holds_its_mean(values):
    found = bootstrap(values)
    assert min(values) - 1e-6 <= found.low <= found.high <= max(values) + 1e-6
    if len(set(values)) == 1:
        assert found.low == pytest.approx(found.high)


def test_an_interval_says_whether_a_difference_is_shown():
    assert bootstrap([1.0, 1.2, 0.9, 1.1]).shows_difference
    assert not bootstrap([1.0, -1.2, 0.9, -1.1]).shows_difference


def test_fidelity_of_known_pictures():
    grey, noise = (
        Image.new("RGB", (192, 192), (100, 100, 100)),
        Image.effect_noise((192, 192), 60).convert("RGB"),
    )
    assert fidelity(grey, grey) == {"psnr": None, "ssim": 1.0, "identical": True}
    lighter = Image.new("RGB", (192, 192), (110, 110, 110))
    assert fidelity(lighter, grey)["psnr"] == pytest.approx(28.131, abs=1e-3)  # 20 log10(255 / 10)
    same = more_fidelity(noise, noise)
    assert same["gmsd"] == 0
    assert same["ms_ssim"] == pytest.approx(1)
    assert more_fidelity(noise, grey)["gmsd"] > 0.1
    assert more_fidelity(noise.crop((0, 0, 128, 128)), grey.crop((0, 0, 128, 128)))["ms_ssim"] is None
    assert gmsd(to_tensor(noise), to_tensor(noise)).shape == (1,)


def test_clip_iqa_is_a_softmax_over_two_texts(tmp_path):
    """On a CLIP of random weights: the arithmetic, not the judgement."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision = text | {"image_size": 32, "patch_size": 8}
    tokenizer = CLIPTokenizer.from_pretrained("assets/tiny_flux/tokenizer")
    text |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path)
    size = {"shortest_edge": 32}
    images = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(tmp_path)
    judge, picture = ClipIqa(str(tmp_path)), Image.effect_noise((64, 64), 60).convert("RGB")
    score = judge(picture)
    pixels = judge.processor(images=[picture], return_tensors="pt")["pixel_values"]
    features = judge.model.get_image_features(pixel_values=pixels)
    features = getattr(features, "pooler_output", features)
    good, bad = torch.nn.functional.cosine_similarity(features, judge.texts).tolist()
    assert score == pytest.approx(1 / (1 + 2.718281828 ** (100 * (bad - good))), abs=1e-4)
    with pytest.raises(OSError, match="hf download"):
        ClipIqa()
