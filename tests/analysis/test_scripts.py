"""What the command-line scripts share: settings, messages in place of tracebacks, files, machine names."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from analysis import bench_step, calibrate, family_table, fit_magcache, fit_teacache, overhead, table
from analysis.cli import guarded, is_embedded, shard, shipped
from analysis.drawing.peak import PeakMemory
from analysis.figures.sheets import fitted, grid
from analysis.measures import words
from analysis.records import provenance, store
from h2cache.machine import cpu_name
from tests.helpers.served import ended, started

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("which"), 2),
        (torch.OutOfMemoryError("CUDA out of memory"), 2),
        (MemoryError("too much"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_a_user_can_mend_is_one_line(capsys, error, code):
    def work():
        raise error

    assert guarded(work, "the rest is kept") == code
    told = capsys.readouterr().err
    assert told == ("stopped: the rest is kept\n" if code == 130 else f"error: {error}\n")


def into_a_closed_pipe(arguments: list[str]) -> int:
    reader, writer = os.pipe()
    os.close(reader)
    sys.stdout = open(writer, "w")  # noqa: SIM115  as a shell gives it
    return table.main(arguments)


def test_a_reader_that_leaves_is_no_error(tmp_path):
    log = tmp_path / "log"
    process = started(into_a_closed_pipe, ["assets/results/tiny_flux_baselines"], log=log)
    assert ended([process], 120) == [1]
    assert log.read_text() == ""


def test_a_fault_of_ours_keeps_its_traceback():
    def work():
        raise KeyError("ours")

    with pytest.raises(KeyError):
        guarded(work, "")


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (table.main, ["MISSING"], "MISSING/table.json is not there"),
        (bench_step.main, ["--model", "MISSING"], "no model folder 'MISSING'"),
        (family_table.main, ["--table", "--out", "MISSING"], "families.json is not there"),
        (calibrate.main, ["--table", "--out", "MISSING"], "MISSING holds no records"),
        (calibrate.main, ["--pairs", "0.3"], "--pairs 0.3: the form is TAU1/TAU2"),
        (words.main, ["MISSING.png"], "MISSING.png"),
        (fit_teacache.main, ["--model", "MISSING/"], "no model folder"),
        (fit_magcache.main, ["--prompts", "MISSING.jsonl"], "MISSING.jsonl"),
    ],
)
def test_a_script_names_what_is_wrong(capsys, main, arguments, message):
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("error: ")


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (family_table.main, ["--methods", "nosuch", "--out", "X"], "unknown method 'nosuch'"),
        (family_table.main, ["--families", "flux"], "give --out DIR"),
        (family_table.main, ["--methods", "h2cache"], "give --out DIR"),
        (calibrate.main, ["--shard", "3/2"], "'3/2' is not I/N"),
        (calibrate.main, ["--dtype", "fp16"], "invalid choice: 'fp16'"),
        (fit_teacache.main, ["--dtype", "fp16"], "invalid choice: 'fp16'"),
        (fit_magcache.main, ["--dtype", "fp16"], "invalid choice: 'fp16'"),
        (overhead.main, ["--dtype", "fp16"], "invalid choice: 'fp16'"),
    ],
)
def test_a_broken_option_is_a_usage_error(capsys, main, arguments, message):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_ctrl_c_is_no_traceback(tmp_path):
    log = tmp_path / "log"
    process = started(calibrate.main, ["--out", str(tmp_path / "out")], log=log)
    for _ in range(600):
        told = log.read_text() if log.exists() else ""
        if "prompt/s" in told or "to go" in told:  # it is drawing
            break
        time.sleep(0.1)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGINT)
    assert ended([process], 60) == [130]
    told = log.read_text()
    assert "stopped: " in told
    assert "Traceback" not in told


def test_the_shell_script_needs_no_command_named_python_and_writes_where_it_is_called(tmp_path):
    """On many machines there is python3 only."""
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    path = tmp_path / "python3"
    path.write_text(f'#!{shutil.which("bash")}\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    command = ["bash", str(CHECKOUT / "run_exper.sh"), "--quick", "--limit", "1", "--methods", "none"]
    command += ["--no-words", "--steps", "2", "--out", "here"]
    environment = os.environ | {"PATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| none |" in (tmp_path / "here" / "table.md").read_text()
    assert not (CHECKOUT / "here").exists()
    path.unlink()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"PATH": str(tmp_path)}
    )
    assert (done.returncode, done.stderr) == (2, "error: neither python nor python3 is on the PATH\n")


def test_a_shard_is_one_of_n():
    assert shard("1/2") == (1, 2)


@pytest.mark.parametrize("model", ["assets/tiny_flux", "./assets/tiny_flux", "/x/assets/tiny_flux/"])
def test_the_embedded_model_is_known_by_its_name(model):
    assert is_embedded(model)
    assert not is_embedded("black-forest-labs/FLUX.1-dev")


def test_files_of_the_checkout_are_found_from_anywhere(monkeypatch, tmp_path):
    assert shipped("assets/tiny_flux") == "assets/tiny_flux"
    monkeypatch.chdir(tmp_path)
    assert shipped("assets/tiny_flux") == str(CHECKOUT / "assets/tiny_flux")


# Files.


def test_sweeping_leaves_what_is_not_surely_dead(tmp_path, monkeypatch):
    dead, own = store.temporary(tmp_path / "a.json", 999999999), store.temporary(tmp_path / "b.json")
    elsewhere = tmp_path / ".a.json.another-machine.999999999.tmp"
    strange = tmp_path / ".x.tmp"
    for path in (dead, own, elsewhere, strange):
        path.write_text("{")
    store.sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {own.name, elsewhere.name, strange.name}

    def forbidden(process: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", forbidden)  # of another user
    store.sweep(tmp_path)
    assert own.exists()


def test_a_broken_line_is_told_plainly_and_kept(tmp_path, capsys):
    path = tmp_path / "records.jsonl"
    path.write_text('{"key": "a"}\n{broken\n')
    for _ in range(2):  # kept once
        assert guarded(lambda: store.write_records(path, store.read_records(path)), "") == 0
    assert capsys.readouterr().err == (
        f"warning: {path} line 2 is left out: "
        "broken JSON (Expecting property name enclosed in double quotes at column 2)\n"
    )
    assert path.read_text() == '{"key": "a"}\n'
    path.write_text('{"key": "a"}\n{broken\n[]\n')
    guarded(lambda: store.read_records(path), "")
    assert (tmp_path / "records.jsonl.broken").read_text() == "{broken\n[]\n"


def test_packed_records_are_read(tmp_path):
    path = tmp_path / "records-0-of-1.jsonl.gz"
    row = {"key": "a", "id": "x", "method": "none", "config": {}, "seconds": 1.0, "seconds_uncached": 1.0}
    row |= {"blocks_run": 1, "psnr": None, "ssim": 1.0, "words": None}
    path.write_bytes(gzip.compress(json.dumps(row).encode() + b'\n{"key": "b"}\n'))
    assert store.read_records(path) == {"a": row, "b": {"key": "b"}}
    assert calibrate.read(tmp_path) == [row]  # a record without its fields makes no table


def test_the_machine_is_what_was_computed_on(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an accelerator")
    assert provenance.machine("cpu")["device_name"] == cpu_name()
    assert provenance.machine("cuda:1")["device_name"] == "an accelerator"
    assert provenance.machine()["device_name"] == "an accelerator"


def test_a_sandbox_without_peaks_tells_none(monkeypatch, tmp_path):
    monkeypatch.setattr("analysis.drawing.peak.RESET", tmp_path)  # it is there, and cannot be written
    peak = PeakMemory(torch.device("cpu"))
    peak.start()
    assert (peak.kind, peak.bytes()) == ("unknown", None)


def test_a_missing_reader_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "reading words needs onnxruntime: pip install" in words.problem()


# Sheets.


@pytest.mark.parametrize("heading", ["h2cache (tiny_flux-5x-nearest)", "block_cache threshold=0.2", "x" * 90])
def test_headings_fit_their_column(heading):
    text, face = fitted(heading, 192)
    assert all(face.getlength(line) <= 192 for line in text.split("\n"))
    if "x" * 90 not in heading:
        assert text.replace("\n", " ") == heading
    picture = Image.new("RGB", (64, 64), "red")
    sheet = grid([[picture, picture]], [heading, "none"], [["a", "b"]])
    assert sheet.getpixel((8 + 192, sheet.height - 24 - 96)) == (255, 255, 255)
    assert sheet.getpixel((8 + 96, sheet.height - 24 - 96)) == (255, 0, 0)
