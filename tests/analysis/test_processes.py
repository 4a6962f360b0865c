"""`run.py --prompts` shared by processes, and what becomes of the work of one that dies."""

import json
import os
import signal
import time

import pytest

import run as script
from analysis import tune
from tests.helpers.served import ended, started

WORDS = ["A", "GO", "BE", "US"]


@pytest.fixture
def command(tmp_path):
    """A command that draws four prompts twice each, without the folder."""
    file = tmp_path / "prompts.txt"
    file.write_text(
        "\n".join(f'a red round sign that says "{word}" on a plain white background' for word in WORDS)
    )
    return ["--prompts", str(file), "--steps", "4", "--tau1", "0.3", "--tau2", "0.3"]


def pictures(folder) -> list[tuple]:
    """What was drawn: each picture once, its decisions and its file."""
    rows = map(json.loads, (folder / "records.jsonl").read_text().splitlines())
    facts = [(r["key"], r["method"], r["psnr"], r["trace"], (folder / r["file"]).read_bytes()) for r in rows]
    return sorted(facts, key=lambda fact: fact[0])


def test_two_processes_draw_what_one_does(tmp_path, command):
    assert script.main([*command, "--processes", "2", "--out", str(tmp_path / "two")]) == 0
    assert script.main([*command, "--out", str(tmp_path / "one")]) == 0
    assert len(pictures(tmp_path / "one")) == 2 * len(WORDS)
    assert pictures(tmp_path / "two") == pictures(tmp_path / "one")
    assert sorted(os.listdir(tmp_path / "two")) == sorted(os.listdir(tmp_path / "one"))


def test_what_a_process_that_dies_had_taken_is_drawn_by_another(tmp_path, command):
    out, logs = tmp_path / "out", [tmp_path / "0.log", tmp_path / "1.log"]
    command = [*command, "--steps", "20", "--out", str(out)]
    processes = [
        started(script.main, command, log=log, RANK=str(n), LOCAL_RANK=str(n), WORLD_SIZE="2")
        for n, log in enumerate(logs)
    ]
    while not any(log.is_file() and "h2cache" in log.read_text() for log in logs):
        time.sleep(0.05)
    os.kill(processes[1].pid, signal.SIGKILL)
    assert ended(processes, 300) == [0, -signal.SIGKILL], logs[0].read_text()[-2000:]
    drawn = pictures(out)
    assert len(drawn) == len({key for key, *_ in drawn}) == 2 * len(WORDS)
    assert f"are in {out}/" in logs[0].read_text()


def test_without_a_file_of_prompts_there_is_nothing_to_share(capsys):
    with pytest.raises(SystemExit):
        script.main(["--processes", "2"])
    assert "give one with --prompts" in capsys.readouterr().err


def test_a_search_runs_in_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert tune.main([]) == 2
    assert "leave the launcher out" in capsys.readouterr().err
