"""Work that several processes share, on one machine or on many that see one folder.

They send no messages. A process takes an item by locking a file and holds the lock while it works, so a fast
one takes more of them. One that dies holds nothing: another takes its item, or the next run does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from analysis.drawing.draw import default_device
from analysis.records import store

T = TypeVar("T")
PAUSE = 0.2  # seconds between two looks at what others work on


def shared(
    items: Iterable[T], folder: Path, name: Callable[[T], str], done: Callable[[T], bool]
) -> Iterator[T]:
    """The `items` that are not `done` and that no other process works on, until nothing is left.

    Waits for what others work on: if one dies, its item comes here. No item is given twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    left = list(items)
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


def launch(command: Sequence[str], processes: int) -> int:
    """Run `python COMMAND` as so many processes of this machine; the exit code of all."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.call([sys.executable, "-m", *launcher, *command])
