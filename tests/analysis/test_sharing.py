"""Work that processes share by locks: who takes what, and what becomes of the work of one that dies."""

import os
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from analysis import trace
from analysis.records import store
from analysis.sharing import shared

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no flock, and no fork")


def work(folder: Path, who: str, seconds: float, dies: bool = False) -> None:
    """Do what is to be done, and write down who did it."""
    (folder / f"{who} is here").touch()
    while len(list(folder.glob("* is here"))) < 2:
        time.sleep(0.01)
    for n in shared(range(12), folder / "taken", str, lambda n: (folder / f"{n}.done").exists()):
        time.sleep(seconds)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        with (folder / "log").open("a") as log:
            log.write(f"{who} {n}\n")
        (folder / f"{n}.done").touch()


def run(folder: Path, *arguments: tuple) -> list[list[str]]:
    """Who did what, by two processes."""
    fork = get_context("fork")
    both = [fork.Process(target=work, args=(folder, *given)) for given in arguments]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    return [line.split() for line in (folder / "log").read_text().splitlines()]


def test_each_item_is_done_once_and_a_fast_process_does_more(tmp_path):
    log = run(tmp_path, ("slow", 0.3), ("fast", 0.01))
    assert sorted(int(n) for _, n in log) == list(range(12))
    assert sum(who == "fast" for who, _ in log) > 6


def test_what_a_process_had_taken_when_it_died_is_done_by_another(tmp_path):
    log = run(tmp_path, ("mortal", 0.1, True), ("heir", 0.1))
    assert [who for who, _ in log] == ["heir"] * 12
    assert sorted(int(n) for _, n in log) == list(range(12))


def test_what_fails_is_not_given_twice(tmp_path):
    assert list(shared([1, 2, 3], tmp_path, str, lambda n: n == 2)) == [1, 3]


def hold(folder: Path) -> None:
    with store.held(folder), store.locked(folder / "records.jsonl"):
        (folder / "held").touch()
        time.sleep(60)


def test_a_killed_process_holds_no_lock(tmp_path, capsys):
    process = get_context("fork").Process(target=hold, args=(tmp_path,))
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    assert trace.main(["--run", "--limit", "1", "--steps", "2", "--out", str(tmp_path)]) == 2
    assert f"process {process.pid}" in capsys.readouterr().err
    process.kill()
    process.join(60)
    assert (tmp_path / ".run.lock").exists()  # nobody has put it away
    with store.held(tmp_path):
        store.add_records(tmp_path / "records.jsonl", {"a": {"key": "a"}})
    assert list(store.read_records(tmp_path / "records.jsonl")) == ["a"]
