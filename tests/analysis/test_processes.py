"""`run.py --prompts` and a search shared by processes, and what becomes of the work of one that dies."""

import json
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

import run as script
from analysis import efficiency, tune
from analysis.measures.processes import Timed
from analysis.records import store
from tests.helpers.served import ended, started

WORDS = ["A", "GO", "BE", "US"]
SEARCH = ["--steps", "6", "--speedups", "2", "--limit", "3", "--held-out", "1", "--trials", "6"]


def two(main, command, logs) -> list:
    """Two processes that run `main`, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    return [
        started(main, command, log=log, **at, RANK=str(n), LOCAL_RANK=str(n)) for n, log in enumerate(logs)
    ]


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
    processes = two(script.main, [*command, "--steps", "20", "--out", str(out)], logs)
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


@pytest.mark.skipif(sys.platform == "win32", reason="there is no flock")
def test_a_lock_that_is_let_go_of_while_one_asks_who_holds_it_is_only_taken(tmp_path):
    def take(_) -> int:
        times = 0
        while times < 100:
            with suppress(TimeoutError), store.locked(tmp_path / "x", patience=0):
                times += 1
        return times

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(take, range(3))) == [100] * 3


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    """What a search finds in one process."""
    path = tmp_path_factory.mktemp("alone") / "plans.json"
    assert tune.main([*SEARCH, "--save", str(path)]) == 0
    return json.loads(path.read_text())


def test_two_processes_find_what_one_does(tmp_path, alone):
    path, logs = tmp_path / "plans.json", [tmp_path / "0.log", tmp_path / "1.log"]
    codes = ended(two(tune.main, [*SEARCH, "--save", str(path)], logs), 300)
    assert codes == [0, 0], [log.read_text()[-2000:] for log in logs]
    assert json.loads(path.read_text()) == alone
    assert ["held out" in log.read_text() for log in logs] == [True, False]
    assert list(tmp_path.glob(".*")) == []


def test_a_search_that_lost_a_process_ends_and_goes_on_later(tmp_path, alone, capfd):
    path, logs = tmp_path / "plans.json", [tmp_path / "0.log", tmp_path / "1.log"]
    command = [*SEARCH, "--save", str(path)]
    processes = two(tune.main, command, logs)
    while not list(tmp_path.glob(".plans-*.jsonl")):
        time.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGKILL)
    assert ended(processes, 300) == [2, -signal.SIGKILL], logs[0].read_text()[-2000:]
    assert "what was measured is kept, and the same call goes on" in logs[0].read_text()
    assert list(tmp_path.glob(".plans-*.jsonl"))
    assert tune.main(command) == 0
    assert json.loads(path.read_text()) == alone


def test_efficiency_keeps_its_own_options(capsys):
    assert efficiency.main(["--", "--steps", "4", "--out", "elsewhere"]) == 2
    assert "--out: that is set here" in capsys.readouterr().err


def test_efficiency_is_over_the_first_and_loading_stands_apart():
    one = Timed(processes=1, loaded=5.0, ended=25.0, pictures=20, drawing=19.0)
    two = Timed(processes=2, loaded=5.0, ended=15.0, pictures=20, drawing=19.0)
    row = two.row(one)
    assert row["efficiency"] == pytest.approx(1.0)
    assert row["with loading"] == pytest.approx((20 / 15 / 2) / (20 / 25))
    assert row["share of loading, %"] == pytest.approx(100 / 3)
