"""How much more several processes draw than one: pictures a second for each core, and what loading takes.

    python -m analysis.efficiency                                       # 1 and 2 processes, 16 prompts
    python -m analysis.efficiency --processes 1 2 --limit 32 -- --method plan --speedup 5
    python -m analysis.efficiency --processes 1 8 -- --model black-forest-labs/FLUX.1-dev    # on 8 GPUs

Runs `run.py --prompts FILE --processes N` with what follows `--`, on N cores with one thread each (with GPUs:
without such limits). Loading ends as the first picture begins. `efficiency` is pictures a second and process
after loading, over those of the first N; `with loading` is of the whole command. Give enough prompts: at the
end processes wait for the last picture.
"""

from __future__ import annotations

import argparse
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

from analysis.cli import TINY_PROMPTS, guarded
from analysis.drawing.draw import default_device
from analysis.options import Parser, at_least_one
from analysis.records import store
from analysis.records.provenance import machine


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


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--processes", type=at_least_one, nargs="+", default=[1, 2])
    parser.add_argument("--prompts", type=Path, default=TINY_PROMPTS, help="default: %(default)s")
    parser.add_argument("--limit", type=at_least_one, default=16, help="prompts (default: %(default)s)")
    parser.add_argument("further", nargs="*", metavar="-- OPTION", help="of run.py")
    return parser.parse_args(argv)


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


def run(args: argparse.Namespace) -> None:
    if own := {"--out", "--prompts", "--processes"} & {text.partition("=")[0] for text in args.further}:
        raise ValueError(f"-- {min(own)}: that is set here, and cannot be an option of run.py")
    lines = args.prompts.read_text(encoding="utf-8").splitlines()[: args.limit]
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / args.prompts.name
        prompts.write_text("\n".join(lines), encoding="utf-8")
        found = []
        for processes in args.processes:
            found.append(timed(processes, prompts, args.further))
            row = found[-1].row(found[0])
            if processes == args.processes[0]:
                print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
            print("| " + " | ".join(f"{value:.4g}" for value in row.values()) + " |", flush=True)
    here = machine(default_device())
    print(f"\n{here['device_name']}, {len(lines)} prompts, run.py {' '.join(args.further)}")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    return guarded(lambda: run(args), "nothing is kept")


if __name__ == "__main__":
    sys.exit(main())
