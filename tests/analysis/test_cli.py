"""Bad input to any option of any command: one line, exit code 2, nothing written."""

import errno
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import ModuleType

import pytest

import run
from analysis import (
    bench_step,
    cache_memory,
    calibrate,
    experiment,
    family_table,
    fit_budcache,
    fit_magcache,
    fit_teacache,
    overhead,
    pareto,
    pfs,
    quality,
    report,
    schematic,
    separation,
    solvers,
    table,
    thresholds,
    trace,
    tune,
)
from analysis.cli import guarded
from analysis.drawing.draw import Limits, load_pipeline
from analysis.drawing.prompts import read_prompts
from analysis.measures import words
from analysis.records import store
from tests.helpers.served import ended, started

CHECKOUT = Path(__file__).resolve().parents[2]
NUMBERS = ["nan", "x", "", "1e999999", "99999999999999999999", "\ud800"]
COUNTS = [*NUMBERS, "0", "-1", "1.5", "inf"]
SIZES = [*COUNTS, "15", "256", "1000000000"]
FILES = ["none", "README.md/x"]
BAD = {  # option: values that it cannot take
    "--batch": COUNTS,
    "--budgets": COUNTS,
    "--burst": COUNTS,
    "--check": ["", "nope"],
    "--checkpoint": ["", "x.bin", "x.safetensors"],
    "--clip": ["./none", "tests"],
    "--converged": COUNTS,
    "--device": ["meta", "nonsense", "", "cuda:99", "cpu:x", "xla"],
    "--double": [*NUMBERS, "-1", "1.5", "inf"],
    "--dtype": ["fp16", "", "float64"],
    "--engine": ["", "onnx"],
    "--evaluations": ["0", "nan", "1.5", "x"],
    "--families": ["", "nope"],
    "--folder": FILES,
    "--frames": [*COUNTS, "3"],
    "--free-gib": ["nan", "-1", "x", "inf"],
    "--guidance": ["nan", "inf", "-inf", "x", ""],
    "--heads": COUNTS,
    "--height": SIZES,
    "--held-out": ["-1", "1.5", "x"],
    "--image-tokens": COUNTS,
    "--img": COUNTS,
    "--input-image": ["none.png", "README.md", "tests", ""],
    "--itemsize": COUNTS,
    "--label": ["nope"],
    "--limit": COUNTS,
    "--trials": COUNTS,
    "--processes": COUNTS,
    "--lora": ["", "none.safetensors", "a/none.safetensors", "./none.safetensors", "x.bin", "a/b/c/d"],
    "--lora-scale": ["nan", "inf", "x", "0.5"],
    "--megabytes": ["0", "-1", "nan", "inf", "x"],
    "--method": ["nope", ""],
    "--methods": ["nope", "h2cache:tau1=x", ""],
    "--metric": ["nope", ""],
    "--model": ["tests", "README.md", "no/such/folder", "x y"],
    "--negative-prompt": ["\ud800"],
    "--out": ["README.md/x"],
    "--out-channels": COUNTS,
    "--pairs": ["0.3", "a/b", "nan/1", "1/2/3/4", "-1/1"],
    "--parts": ["nope", ""],
    "--preset": ["nope", ""],
    "--prompt": ["\ud800"],
    "--prompts": ["none.txt", "tests", "README.md", ""],
    "--psnr": ["nan", "x"],
    "--records": FILES,
    "--rounds": COUNTS,
    "--sampler": ["nope", "", "ddim"],
    "--seed": ["nan", "1.5", "x", "", "-99999999999999999999", "99999999999999999999"],
    "--set": ["tau1", "=", "colour=red", "tau1=nan", "tau1=x", "tau1=-1", "pool1=x"],
    "--shard": ["2/2", "x", "-1/2", "1/0"],
    "--side": [*COUNTS, "15"],
    "--single": [*NUMBERS, "-1", "1.5", "inf"],
    "--speedup": ["nan", "0", "x", "-inf"],
    "--speedups": ["nan", "0", "x", "-1", "0.5", "1"],
    "--steps": COUNTS,
    "--tau1": ["nan", "x", "-1"],
    "--tau2": ["nan", "x", "-1"],
    "--text": COUNTS,
    "--text-tokens": ["nan", "x", "-1"],
    "--threads": COUNTS,
    "--tokens": COUNTS,
    "--true-cfg": ["nan", "inf", "x", "2"],
    "--txt": ["nan", "x", "-1"],
    "--width": COUNTS,
}
ANY = {"--id", "--pictured", "--save"}  # names, which may be of nothing
OUT = ["--out", "OUT"]
COMMANDS = {  # and what is given besides
    run: OUT, calibrate: OUT, experiment: OUT, fit_teacache: OUT, fit_magcache: [], tune: [], bench_step: [],
    fit_budcache: [],
    overhead: ["--width", "48"], cache_memory: [], family_table: OUT, table: [], words: [],
    pareto: [*OUT, "--run"], pfs: [*OUT, "--run"], quality: [*OUT, "--run"], report: [*OUT, "--run"],
    schematic: OUT, separation: [*OUT, "--run"], solvers: [*OUT, "--run"], thresholds: [*OUT, "--run"],
    trace: [*OUT, "--run"],
}  # fmt: skip
DRAWN = {"--records", "--folder", "--label", "--metric", "--megabytes"}  # of figures, without --run


def options(module: ModuleType) -> list[str]:
    """The options of a command that take a value, from its help."""
    told = io.StringIO()
    with redirect_stdout(told), suppress(SystemExit):
        module.main(["--help"])
    return re.findall(r"^ +(--[\w-]+) [A-Z{\[]", told.getvalue(), re.MULTILINE)


def cases() -> list[tuple]:
    """Every option of every command, with 250 of the values they cannot take."""
    pairs = [(m, o) for m in COMMANDS for o in options(m) if o not in ANY]
    more = [(m, o, v) for m, o in pairs for v in BAD[o]]
    one = [(m, o, random.Random(f"{m}{o}").choice(BAD[o])) for m, o in pairs]
    return [*one, *random.Random(0).sample(more, 250)]


def too_long(*_) -> None:
    raise AssertionError("it began to work")


@pytest.mark.parametrize(("module", "option", "value"), cases())
def test_bad_input_is_one_line(module, option, value, tmp_path, capsys, recwarn):
    before, out = signal.signal(signal.SIGALRM, too_long), tmp_path / "out"
    signal.alarm(20)
    given = [str(out) if part == "OUT" else part for part in COMMANDS[module]]
    try:
        code = module.main([*(p for p in given if p != "--run" or option not in DRAWN), f"{option}={value}"])
    except SystemExit as stopped:
        code = stopped.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    told = [line for line in capsys.readouterr().err.strip().split("\n") if not line.endswith(" to go")]
    assert code == 2, told
    assert [line.startswith("error: ") for line in told].count(True) == 1, told
    assert all(line.startswith(("error: ", "warning: ")) for line in told), told
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
            store.add_records(path, {f"{name}{n}": {"key": f"{name}{n}"}})

    writers = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(store.read_records(path)) == 32
    assert os.listdir(tmp_path) == ["records.jsonl"]


def test_a_killed_writer_holds_nothing(tmp_path):
    path = tmp_path / "records.jsonl"
    (tmp_path / ".records.jsonl.lock").write_text("process 1 on another")
    store.add_records(path, {"a": {"key": "a"}})
    assert len(store.read_records(path)) == 1


@pytest.mark.parametrize(
    "model", ["assets/tiny_flux/", "./assets/tiny_flux", os.path.abspath("assets/tiny_flux")]
)
def test_a_folder_has_one_name(model, monkeypatch, tmp_path):
    assert store.place(model) == "assets/tiny_flux"
    assert store.as_before({"model": "assets/tiny_flux"}, [{"model": model}]) == {"model": model}


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


def test_two_runs_in_one_folder_lose_no_record(tmp_path):
    prompts, out = tmp_path / "p.txt", tmp_path / "out"
    prompts.write_text("".join(f'a red round sign that says "{c}"\n' for c in "ABCD"))
    command = ["--prompts", str(prompts), "--out", str(out), "--steps", "2", "--no-compare"]
    command += ["--method", "none", "--seed"]
    logs = [tmp_path / f"{seed}.log" for seed in "12"]
    runs = [started(run.main, [*command, log.stem], log=log) for log in logs]
    assert ended(runs, 120) == [0, 0], [log.read_text() for log in logs]
    rows = store.read_records(out / "records.jsonl")
    assert len(rows) == 8
    assert {row["file"] for row in rows.values()} | {"records.jsonl"} == set(os.listdir(out))


def test_ctrl_c_while_modules_load_is_one_line():
    process = subprocess.Popen(
        [sys.executable, "-v", "run.py"],
        cwd=CHECKOUT,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert any(b"import 'torch._C'" in line for line in process.stderr)  # -v names what is loaded
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert "stopped: nothing has begun\n" in told
    assert "Traceback" not in told


def test_one_step_is_drawn_and_explained(tmp_path, capsys):
    assert run.main(["--steps", "1", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().err.strip().split("\n")
    assert [line for line in told if "nothing can be skipped" in line] == told[:1]
    rows = store.read_records(tmp_path / "records.jsonl").values()
    assert [row["identical"] for row in rows if row["method"] != "none"] == [True, True]


def test_records_of_no_seconds_and_of_another_spelling_are_taken(tmp_path, capsys):
    (tmp_path / "p.txt").write_text('a red round sign that says "A"\n')
    command = ["--prompts", str(tmp_path / "p.txt"), "--steps", "2", "--tau1", "1", "--tau2", "1"]
    command += ["--out", str(tmp_path / "out"), "--model"]
    assert run.main([*command, "./assets/tiny_flux/"]) == 0
    path = tmp_path / "out" / "records.jsonl"
    before = [json.loads(line) for line in path.read_text().splitlines()]
    settings = (
        "prompt",
        "seed",
        "model",
        "steps",
        "height",
        "width",
        "guidance",
        "device",
        "dtype",
        "method",
    )
    for row in before:  # as an older version wrote them, with the spelling in the key
        row |= {"model": "./assets/tiny_flux/", "seconds": 0.0, "speed_up": None, "psnr": None, "ssim": None}
        row["identical"] = None
        old = row["file"]
        decisive = {name: row[name] for name in (*settings, "method", "config")}
        row["key"] = store.run_key(id=row["id"], **decisive)
        row["file"] = f"{row['id']}-{row['method']}-{row['key'][:6]}.png"
        os.rename(path.parent / old, path.parent / row["file"])
    path.write_text("".join(json.dumps(row) + "\n" for row in before))
    assert run.main([*command, "assets/tiny_flux"]) == 0
    after = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["date"] for row in after] == [row["date"] for row in before]  # not drawn again
    assert [row["key"] for row in after] == [row["key"] for row in before]
    assert after[1]["ssim"] is not None
    assert after[1]["speed_up"] is None


def test_half_a_line_at_the_end_is_left_out_and_repaired(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"key": "a"}\n{"key": "b", "x')
    with pytest.warns(store.BrokenLine, match="breaks off in line 2"):
        assert list(store.read_records(path)) == ["a"]
    store.add_records(path, {"c": {"key": "c"}})
    store.add_records(path, {"a": {"key": "a", "new": 1}})
    assert path.read_text() == '{"key": "a"}\n{"key": "c"}\n{"key": "a", "new": 1}\n'
    assert store.tidy(path) == {"a": {"key": "a", "new": 1}, "c": {"key": "c"}}
    assert path.read_text() == '{"key": "a", "new": 1}\n{"key": "c"}\n'
    path.write_text('{"key": "a"}')  # an editor left the end of the line out
    store.add_records(path, {"c": {"key": "c"}})
    assert list(store.read_records(path)) == ["a", "c"]


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    store.add_records(path, {"a": {"key": "a"}})

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: .*records\.jsonl"):
            store.add_records(path, {"b": {"key": "b"}})
    assert path.read_text() == '{"key": "a"}\n'


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "read and write"),
        (errno.EROFS, "write to"),
        (errno.EIO, "check that place"),
    ],
)
def test_an_error_that_is_a_number_names_the_place_and_what_to_do(number, advice, capsys):
    def work() -> None:
        raise OSError(number, os.strerror(number), "some/place")

    assert guarded(work, "") == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: some/place: {os.strerror(number)}: ")
    assert advice in told


def test_a_second_run_in_a_held_folder_is_refused(tmp_path, capsys):
    with store.held(tmp_path):
        assert trace.main(["--run", "--limit", "1", "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert f"process {os.getpid()}" in told
    assert "give another --out" in told
    assert not os.listdir(tmp_path)


def test_closed_stdout_is_no_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # what Python makes of it
    assert run.main(["--steps", "2", "--method", "none", "--out", str(tmp_path)]) == 0
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as stopped:
        run.main(["--steps", "nan"])
    assert stopped.value.code == 2
