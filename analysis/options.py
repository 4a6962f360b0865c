"""Options of the command line: numbers within their range, and one line on stderr for what is wrong."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable

MOST = 600  # characters of a line on stderr
MANY = 100_000  # steps, frames or pixels of a side: none has been drawn, and a loop over more ends nowhere


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose help keeps the lines of the docstring."""

    def __init__(self, description: str | None = None, **options: object) -> None:
        speak_anyhow()
        usual = {"formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(description=description, **usual | options)  # type: ignore[arg-type]

    def error(self, message: str) -> None:  # type: ignore[override]
        """Exit code 2."""
        self.exit(2, f"error: {one_line(message)} (--help names all options)\n")


def one_line(text: object) -> str:
    """`text` without line ends and what a terminal would obey, and not endless."""
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= MOST else f"{line[: MOST - 200]} [...] {line[-190:]}"


def speak_anyhow() -> None:
    """What a terminal cannot show is written as \\u00e9; what is closed takes everything in silence."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def whole(least: int, most: int = MANY) -> Callable[[str], int]:
    """The type of an option: a whole number from `least` to `most`."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text}: a whole number from {least} to {most} is needed")
        return value

    return number


at_least_one = whole(1)
side = whole(1, 2**40)  # pixels; what memory has room for is asked later
seed = whole(-(2**63), 2**64 - 1)  # what torch.Generator takes


def positive(text: str) -> float:
    """The type of an option: a finite number above 0."""
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text}: a number above 0 is needed")
    return value


def not_negative(text: str) -> float:
    """The type of an option: a finite number, 0 or above."""
    value = finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: a number of 0 or above is needed")
    return value


def finite(text: str) -> float:
    """The type of an option: a number, not nan or inf."""
    value = number(text)
    if math.isinf(value):
        raise argparse.ArgumentTypeError(f"{text}: a finite number is needed")
    return value


def number(text: str) -> float:
    """The type of an option: a number or inf, not nan."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"{text}: a number is needed")
    return value
