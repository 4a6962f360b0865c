"""`python run.py` as a user types it."""

import json
import os
import signal
import time

import pytest
import torch
from PIL import Image

import run as script
from tests.helpers.served import ended, started

FAST = ["--steps", "4", "--tau1", "0.3", "--tau2", "0.3"]


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_without_arguments_it_draws_both_and_compares(tmp_path, capsys):
    """With nothing but the folder to write to."""
    assert script.main(["--out", str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert "none" in told.out
    assert "h2cache" in told.out
    reference, cached, planned = rows(tmp_path)
    assert [row["method"] for row in (reference, cached, planned)] == ["none", "h2cache", "plan"]
    assert planned["blocks_run"] == planned["blocks"] / 5
    assert planned["psnr"] > 50
    assert reference["blocks_run"] == reference["blocks"] == cached["blocks"] == 900
    assert cached["blocks_run"] < 450
    assert cached["psnr"] > 20
    assert cached["seed"] == reference["seed"]
    assert cached["hits"]["structure"] == sum(
        r["outcome"] == "hit" for r in cached["trace"] if r["stage"] == "structure"
    )
    assert {"versions", "device_name"} <= set(cached["machine"])
    for row in (reference, cached, planned):
        assert Image.open(tmp_path / row["file"]).size == (128, 128)
    side_by_side = Image.open(tmp_path / planned["file"].replace(".png", "-compared.png"))
    assert side_by_side.width > 3 * 384
    assert len(os.listdir(tmp_path)) == 5  # nothing temporary is left


@pytest.mark.parametrize(
    ("asked", "evaluated"),
    [(["--speedup", "4"], 5), (["--evaluations", "7"], 7), (["--method", "plan"], 4), (["--psnr", "99"], 20)],
)
def test_a_speed_or_a_quality_is_asked_for(tmp_path, asked, evaluated):
    assert script.main(["--out", str(tmp_path), "--steps", "20", "--no-compare", *asked]) == 0
    (row,) = rows(tmp_path)
    assert row["method"] == "plan"
    assert row["blocks_run"] == evaluated * 18


@pytest.mark.parametrize("given", [["--preset", "tiny_flux-fastest"], ["--tau1", "inf", "--tau2", "inf"]])
def test_infinite_thresholds_are_recorded(tmp_path, given):
    assert script.main(["--out", str(tmp_path), "--steps", "4", *given]) == 0
    cached = rows(tmp_path)[1]
    assert cached["config"]["tau1"] == "inf"
    assert cached["trace"][2]["threshold"] == "inf"
    assert cached["blocks_run"] == 18 + 3 * 2


def test_a_prompt_file_is_drawn_and_a_second_run_resumes(tmp_path, capsys):
    prompts = tmp_path / "p.jsonl"
    texts = [f'a red round sign that says "{w}" on a plain white background' for w in ("A", "GO")]
    prompts.write_text("\n".join(json.dumps({"prompt": t}) for t in texts))
    out = tmp_path / "out"
    command = ["--prompts", str(prompts), "--out", str(out), *FAST]
    assert script.main(command) == 0
    first = rows(out)
    assert [r["id"] for r in first] == ["0001", "0001", "0002", "0002"]
    os.remove(out / first[3]["file"])
    capsys.readouterr()
    assert script.main(command) == 0
    again = rows(out)
    assert again[:3] == first[:3]  # seconds and date included: not drawn again
    assert again[3]["date"] >= first[3]["date"]
    assert (out / again[3]["file"]).is_file()
    assert script.main([*command, "--seed", "1"]) == 0
    assert len(rows(out)) == 8  # another seed never reuses


def test_a_record_of_another_form_is_drawn_again(tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text('a red round sign that says "GO" on a plain white background')
    command = ["--prompts", str(prompts), "--out", str(tmp_path), "--no-compare", *FAST]
    assert script.main(command) == 0
    (before,) = rows(tmp_path)
    for trace in (None, [{}], ["miss"]):
        (tmp_path / "records.jsonl").write_text(json.dumps(before | {"trace": trace}) + "\n")
        assert script.main(command) == 0
        (after,) = rows(tmp_path)
        assert [step["outcome"] for step in after["trace"]] == [step["outcome"] for step in before["trace"]]


def test_one_method_alone(tmp_path, capsys):
    assert script.main(["--method", "none", "--out", str(tmp_path), "--steps", "2"]) == 0
    assert script.main(["--no-compare", "--out", str(tmp_path), *FAST]) == 0
    assert [r["method"] for r in rows(tmp_path)] == ["none", "h2cache"]
    assert not list(tmp_path.glob("*compared*"))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (["--tau1", "-1"], "tau1=-1.0 is out of range"),
        (["--tau1", "fast"], "cannot set tau1 to 'fast'"),
        (["--set", "colour=red"], "cannot set 'colour=red'"),
        (["--method", "none", "--tau1", "0.1"], "--tau1 belongs to h2cache, not to none"),
        (["--method", "teacache", "--speedup", "3"], "--speedup belongs to the plan, not to teacache"),
        (["--speedup", "3", "--tau1", "0.1"], "give one of them"),
        (["--speedup", "3", "--psnr", "40"], "say one of them"),
        (["--speedup", "0.5"], "speedup=0.5 is out of range"),
        (["--prompts", "missing.txt"], "missing.txt"),
        (["--height", "256"], "height=256: this model draws height 128 only"),
        (["--model", "no/such/folder"], "no model folder 'no/such/folder'"),
        (["--model", "tests"], "no model_index.json"),
        (["--device", "nonsense"], "device 'nonsense' cannot be used here"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(tmp_path, capsys, bad, says):
    out = tmp_path / "out"
    assert script.main([*bad, "--out", str(out)]) == 2
    assert says in capsys.readouterr().err
    assert not out.exists() or not os.listdir(out)


@pytest.mark.parametrize("bad", [["--frobnicate"], ["--method", "nope"], ["--steps", "0"], ["--steps", "x"]])
def test_bad_flags_exit_with_one_line(bad, capsys):
    with pytest.raises(SystemExit) as error:
        script.main(bad)
    assert error.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1


def test_a_broken_prompt_file_names_the_line(tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "ok"}\n{oops\n')
    assert script.main(["--prompts", str(path), "--out", str(tmp_path / "o")]) == 2
    assert "line 2: broken JSON" in capsys.readouterr().err


def test_a_hub_model_that_cannot_be_had_says_what_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert script.main(["--model", "nobody/nothing", "--out", str(tmp_path)]) == 2
    assert "hf download nobody/nothing" in capsys.readouterr().err


def test_words_the_model_cannot_spell_are_warned_about(tmp_path, capsys):
    prompt = 'a red round sign that says "Coffee" on a plain white background'
    assert script.main(["--prompt", prompt, "--out", str(tmp_path), "--no-compare", *FAST]) == 0
    assert 'this model cannot spell "Coffee"' in capsys.readouterr().err


def test_a_preset_away_from_home_is_told(tmp_path, capsys):
    quick = ["--steps", "2", "--no-compare", "--out", str(tmp_path)]
    assert script.main(quick) == 0
    assert "were measured on tiny_flux at 50 steps and 128x128; here: 2 steps" in capsys.readouterr().err
    assert script.main([*quick, "--tau1", "0.3", "--tau2", "0.3"]) == 0  # nothing of the preset is left
    assert "were measured" not in capsys.readouterr().err


def test_an_accelerator_without_room_is_one_line(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(script, "warm_up", full)
    assert script.main(["--out", str(tmp_path), *FAST]) == 2
    assert capsys.readouterr().err.strip() == "error: CUDA out of memory. Tried to allocate 20 GiB"


def test_a_full_disk_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 2**20}))
    assert script.main(["--out", str(tmp_path)]) == 2
    assert "1 MiB are free" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_finished(tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text(
        "".join(f'a red round sign that says "{c}" on a white background\n' for c in "ABCDEFGH" * 5)
    )
    out, log = tmp_path / "out", tmp_path / "log"
    process = started(script.main, ["--prompts", str(prompts), "--out", str(out)], log=log)
    for _ in range(600):
        if (out / "records.jsonl").exists():
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    assert ended([process], 60) == [130]
    assert "finished pictures and their records are kept" in log.read_text()
    kept = rows(out)
    assert 0 < len(kept) < 80
    assert not list(out.glob(".*"))
    for row in kept:
        Image.open(out / row["file"]).load()
