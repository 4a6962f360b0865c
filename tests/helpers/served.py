"""Processes that begin with everything loaded: importing takes seconds, and these share one import.

For tests of what processes do to one another, or of one that is stopped; not of how a command starts.
"""

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

LOADED = ["run", "analysis.experiment", "analysis.calibrate", "tests.helpers.two_processes"]


def started(main: Callable[..., int | None], *arguments, log: Path, **environment: str) -> BaseProcess:
    """A process that runs `main(*arguments)`; what it says goes to the file `log`.

    Its `exitcode` is what `main` returns.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    given = (main, arguments, str(log), os.getcwd(), environment)
    process = context.Process(target=_work, args=given, daemon=True)
    process.start()
    return process


def _work(main: Callable, arguments: tuple, log: str, folder: str, environment: dict[str, str]) -> None:
    import torch

    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(out, standard)
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    code = main(*arguments)
    with suppress(OSError):
        sys.stdout.flush()
    sys.exit(code)
