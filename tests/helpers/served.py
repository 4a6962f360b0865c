"""Processes that begin with everything loaded: importing takes seconds, and these share one import.

For tests of what processes do to one another, or of one that is stopped; not of how a command starts.
"""

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

LOADED = ["run", "analysis.calibrate", "analysis.experiment", "tests.helpers.two_processes"]


def started(main: Callable[..., int | None], *arguments, log: Path, **environment: str) -> BaseProcess:
    """A process that runs `main(*arguments)` and exits with what that returns.

    log: the file for what it says.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    process = context.Process(target=_work, args=(main, arguments, log, environment), daemon=True)
    process.start()
    return process


def ended(processes: list[BaseProcess], seconds: float) -> list[int | None]:
    """Their exit codes, None of one that had to be killed after `seconds`."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def _work(main: Callable, arguments: tuple, log: Path, environment: dict[str, str]) -> None:
    import torch

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(file, standard)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell ignore it
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # two threads starve each other on a busy machine
    sys.exit(main(*arguments))
