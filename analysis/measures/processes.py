"""How long `run.py` takes with several processes, and how much of that is loading."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from analysis.drawing.draw import default_device
from analysis.records import store


@dataclass
class Timed:
    """One command: seconds from its start."""

    processes: int
    loaded: float  # the first picture begins
    ended: float  # the last one is saved
    pictures: int
    drawing: float  # of all pictures together

    def row(self, first: Timed) -> dict[str, float]:
        """As a line of the table; first: what efficiency is measured by."""
        return {
            "processes": self.processes,
            "pictures": self.pictures,
            "loading, s": self.loaded,
            "share of loading, %": 100 * self.loaded / self.ended,
            "s / picture": self.drawing / self.pictures,
            "pictures / s and process": self.rate,
            "efficiency": self.rate / first.rate,
            "with loading": self.whole_rate / first.whole_rate,
        }

    @property
    def rate(self) -> float:
        return self.pictures / (self.ended - self.loaded) / self.processes

    @property
    def whole_rate(self) -> float:
        return self.pictures / self.ended / self.processes


def timed(processes: int, prompts: Path, further: list[str]) -> Timed:
    """Draw all `prompts` with so many processes, in a folder that is thrown away."""
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if default_device() == "cpu":
        environment["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(store.CHECKOUT / "run.py"), "--prompts", str(prompts), "--out", folder]
        command += ["--processes", str(processes), *further]
        start, times = time.monotonic(), []
        with _on_cores(processes):
            running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert running.stdout is not None
        for line in running.stdout:
            if re.search(r"\d+/\d+", line):  # blocks of a picture
                times.append(time.monotonic() - start)
        if running.wait():
            raise ValueError(f"{' '.join(command)} ended with code {running.returncode}")
        rows = list(store.read_records(Path(folder) / "records.jsonl").values())
    # Lines come when all pictures of a prompt are there.
    first = [row["seconds"] for row in rows if row["id"] == rows[0]["id"]]
    drawing = sum(row["seconds"] for row in rows)
    return Timed(processes, times[0] - sum(first), times[-1], len(rows), drawing)


@contextmanager
def _on_cores(count: int) -> Iterator[None]:
    """What is started within it has so many cores, where the system can divide them."""
    if default_device() != "cpu" or not hasattr(os, "sched_setaffinity"):
        yield
        return
    own = os.sched_getaffinity(0)
    if count > len(own):
        raise ValueError(f"{count} processes need as many cores, and {len(own)} are here")
    os.sched_setaffinity(0, sorted(own)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)
