"""Bad input to any option of any command: one line, exit code 2, nothing written."""

import json
import os
import random
import subprocess
import sys
import threading

import pytest

import run
from analysis import calibrate, keep
from analysis.prompts import read_prompts
from analysis.runs import Limits, load_pipeline

NUMBERS = ["nan", "x", "", "1e999999", "99999999999999999999", "\ud800"]
COUNTS = [*NUMBERS, "0", "-1", "1.5", "inf"]
SIZES = [*COUNTS, "15", "256", "1000000000"]
BAD = {  # option: values that it cannot take
    "--steps": COUNTS,
    "--seed": ["nan", "1.5", "x", "", "-99999999999999999999", "99999999999999999999"],
    "--height": SIZES,
    "--width": SIZES,
    "--frames": [*COUNTS, "3"],
    "--guidance": ["nan", "inf", "-inf", "x", ""],
    "--true-cfg": ["nan", "inf", "x", "2"],
    "--lora-scale": ["nan", "inf", "x"],
    "--device": ["meta", "nonsense", "", "cuda:99", "cpu:x", "xla"],
    "--dtype": ["fp16", "", "float64"],
    "--engine": ["", "onnx"],
    "--checkpoint": ["x.bin", "x.safetensors"],
    "--lora": ["none.safetensors", "a/none.safetensors", "./none.safetensors", "x.bin", "a/b/c/d"],
    "--input-image": ["none.png", "README.md", "tests"],
    "--model": ["tests", "README.md", "no/such/folder", "x y"],
    "--set": ["tau1", "=", "colour=red", "tau1=nan", "tau1=x", "tau1=-1", "pool1=x"],
    "--shard": ["2/2", "x", "-1/2", "1/0"],
    "--pairs": ["0.3", "a/b", "nan/1", "1/2/3/4", "-1/1"],
    "--tau1": ["nan", "x", "-1"],
    "--tau2": ["nan", "x", "-1"],
    "--prompts": ["none.txt", "tests", "README.md"],
    "--method": ["nope", ""],
    "--preset": ["nope", ""],
    "--speedup": ["nan", "0", "x", "-inf"],
    "--evaluations": ["0", "nan", "1.5", "x"],
    "--psnr": ["nan", "x"],
}
ONLY = {
    run: {"--method", "--preset", "--speedup", "--evaluations", "--psnr"},
    calibrate: {"--shard", "--pairs"},
}


def cases() -> list[tuple]:
    """150 of all, of each command."""
    other = {run: ONLY[calibrate], calibrate: ONLY[run]}
    every = [(m, o, v) for m in (run, calibrate) for o, vs in BAD.items() if o not in other[m] for v in vs]
    return random.Random(0).sample(every, 150)


@pytest.mark.parametrize(("module", "option", "value"), cases())
def test_bad_input_is_one_line(module, option, value, tmp_path, capsys, recwarn):
    out = tmp_path / "out"
    try:
        code = module.main([f"{option}={value}", "--out", str(out)])
    except SystemExit as stopped:
        code = stopped.code
    told = capsys.readouterr().err.strip().split("\n")
    assert code == 2, told
    assert [line.startswith("error: ") for line in told].count(True) == 1
    assert all(line.startswith(("error: ", "warning: ")) for line in told)
    assert not out.exists() or not os.listdir(out)


def test_pairs_and_set_may_not_contradict(capsys, tmp_path):
    assert calibrate.main(["--pairs", "0.3/0.1", "--set", "tau1=3", "--out", str(tmp_path)]) == 2
    assert "--set tau1=3.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("facts", "says"), [('{"quoted_word": "("}', "quoted_word"), ('{"colour": 1}', "colour"), ("[]", "JSON")]
)
def test_broken_limits_name_the_file(tmp_path, facts, says):
    (tmp_path / "limits.json").write_text(facts)
    with pytest.raises(ValueError, match=rf"limits\.json.*{says}"):
        Limits.of(str(tmp_path))


def test_a_prompt_file_is_split_at_line_feeds_only(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffa\u2028b\r\nc\x0cd\n".encode())
    assert [p.text for p in read_prompts(path)] == ["a\u2028b", "c\x0cd"]


def test_records_of_two_writers_are_all_kept(tmp_path):
    path = tmp_path / "records.jsonl"

    def write(name: str) -> None:
        for n in range(16):
            keep.add_records(path, {f"{name}{n}": {"key": f"{name}{n}"}})

    writers = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(keep.read_records(path)) == 32
    assert os.listdir(tmp_path) == ["records.jsonl"]


def test_a_killed_writer_holds_nothing(tmp_path):
    path = tmp_path / "records.jsonl"
    (tmp_path / ".records.jsonl.lock").write_text("process 1 on another")
    keep.add_records(path, {"a": {"key": "a"}})
    assert len(keep.read_records(path)) == 1


@pytest.mark.parametrize(
    "model", ["assets/tiny_flux/", "./assets/tiny_flux", os.path.abspath("assets/tiny_flux")]
)
def test_a_folder_has_one_name(model, monkeypatch, tmp_path):
    assert keep.place(model) == "assets/tiny_flux"
    assert keep.as_before({"model": "assets/tiny_flux"}, [{"model": model}]) == {"model": model}


def test_a_picture_cut_short_or_a_record_without_fields_is_made_again(tmp_path):
    (tmp_path / "p.txt").write_text('a red round sign that says "A"\n')
    out = tmp_path / "out"
    command = [
        "--prompts",
        str(tmp_path / "p.txt"),
        "--steps",
        "2",
        "--no-compare",
        "--tau1",
        "1",
        "--tau2",
        "1",
    ]
    assert run.main([*command, "--out", str(out)]) == 0
    (picture,) = out.glob("*.png")
    whole = picture.read_bytes()
    picture.write_bytes(whole[:500])
    assert run.main([*command, "--out", str(out)]) == 0
    assert picture.read_bytes() == whole
    path = out / "records.jsonl"
    row = json.loads(path.read_text())
    path.write_text(json.dumps({"key": row["key"], "id": row["id"]}) + "\n")
    assert run.main([*command, "--out", str(out), "--model", "./assets/tiny_flux/"]) == 0
    assert json.loads(path.read_text())["blocks_run"] == row["blocks_run"]


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "FluxPipeline", "transformer": ["diffusers", "x"]}'
    )
    (tmp_path / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\.bin: pickled weights"):
        load_pipeline(str(tmp_path), "cpu", None)


def test_closed_stdout_is_no_traceback(tmp_path):
    command = f'exec "{sys.executable}" run.py --steps nan >&-'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
