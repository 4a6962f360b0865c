"""Work that several processes share, on one machine or on many that see one folder.

Where all items are known at the start they send no messages. A process takes an item by locking a file and
holds the lock while it works, so a fast one takes more of them. One that dies holds nothing: another takes
its item, or the next run does.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from analysis.drawing.draw import default_device
from analysis.records import store

T = TypeVar("T")
LONGEST = timedelta(days=1)  # that one process may draw while another waits for it
PAUSE = 0.2  # seconds between two looks at what others work on


def shared(
    items: Iterable[T], folder: Path, name: Callable[[T], str], done: Callable[[T], bool]
) -> Iterator[T]:
    """The `items` that are not `done` and that no other process works on, until nothing is left.

    Waits for what others work on: if one dies, its item comes here. No item is given twice. Each process
    begins elsewhere, so that it seldom meets another before the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    left = list(items)
    begin = len(left) * int(os.environ.get("RANK", "0")) // int(os.environ.get("WORLD_SIZE", "1"))
    left = left[begin:] + left[:begin]
    while left:
        busy = []
        for item in left:
            if done(item):
                continue
            try:
                with store.locked(folder / name(item), patience=0):
                    if not done(item):
                        yield item
            except TimeoutError:
                busy.append(item)
        left = busy
        time.sleep(PAUSE if left else 0)


def is_one_of_many() -> bool:
    """Whether a launcher (torchrun, accelerate) started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


def own_device() -> str:
    """This machine's accelerator; of several processes on it, each has another."""
    device = default_device()
    if device == "cpu" or not is_one_of_many():
        return device
    return f"{device}:{int(os.environ.get('LOCAL_RANK', '0')) % torch.accelerator.device_count()}"


def joined() -> Any:
    """The group of all processes that a launcher started, for messages; None: this one is alone."""
    if not is_one_of_many():
        return None
    dist.init_process_group("gloo", timeout=LONGEST)
    return dist.group.WORLD


def launch(command: Sequence[str], processes: int) -> int:
    """Run `python COMMAND` as so many processes of this machine, each with its share of the cores.

    If one dies the others go on. A signal to this process reaches them all. Returns 0 if all have ended well.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    common = {"OMP_NUM_THREADS": str(max(1, cores // processes)), **os.environ}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    started: list[subprocess.Popen] = []
    with _passed_on(started):
        for rank in range(processes):
            own = common | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            # Of a session of its own, or the terminal's Ctrl-C came twice.
            started.append(subprocess.Popen([sys.executable, *command], env=own, start_new_session=True))
        codes = [process.wait() for process in started]
    for rank, code in enumerate(codes):
        if code < 0:
            print(f"process {rank} of {processes} was ended by signal {-code}", file=sys.stderr)
    return 130 if 130 in codes else next((abs(code) for code in codes if code), 0)


@contextmanager
def _passed_on(processes: Iterable[subprocess.Popen]) -> Iterator[None]:
    """Within it, what would end this process goes to `processes` instead."""

    def pass_on(number: int, _: Any) -> None:
        for process in processes:
            process.send_signal(number)

    signals = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    before = {s: signal.getsignal(s) for s in signals if s and signal.getsignal(s) is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, pass_on)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
