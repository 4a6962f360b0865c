"""Everything about this library that only a GPU can show, in one run that ends in a given time.

    python -m analysis.gpu_report --out outputs/gpu                        # one H100 or similar, 6 minutes
    python -m analysis.gpu_report --out /tmp/report --device cpu --small   # that it runs: under a minute

Bits, times of every kind of step at FLUX.1-dev's shapes (random weights, 24 GB), memory, waits, compiled
models, whole pictures, behaviour. The most important first, each written as soon as it is done; what fails
is recorded, and the next goes on. DIR gets environment.json, records.jsonl and report.md.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from analysis.cli import guarded
from analysis.drawing.draw import check_device, default_device
from analysis.gpu_report.compiled import compiled
from analysis.gpu_report.context import Context, OutOfTime
from analysis.gpu_report.contract import contract
from analysis.gpu_report.costs import memory, waits
from analysis.gpu_report.exact import exact
from analysis.gpu_report.pictures import pictures
from analysis.gpu_report.report import markdown
from analysis.gpu_report.steps import steps
from analysis.records import store
from analysis.records.provenance import command_of, machine, now

SECTIONS: dict[str, tuple[Callable[[Context], Iterator[dict]], float]] = {  # and its share of the time
    "exact": (exact, 0.22),
    "steps": (steps, 0.34),
    "memory": (memory, 0.08),
    "waits": (waits, 0.06),
    "compiled": (compiled, 0.28),
    "pictures": (pictures, 0.06),
    "contract": (contract, 0.06),
}
LARGE = ("steps", "memory")  # sections that use the large model
SPARE = 8.0  # seconds kept for the end


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--small", action="store_true", help="tiny widths and few cases: a trial run")
    parser.add_argument("--minutes", type=float, default=6.0, help="for everything (default: %(default)s)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"--minutes {args.minutes}: it must be more than 0")
    return args


def environment(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """What the report was made on."""
    found = machine(args.device) | {"date": now(), "command": command}
    if torch.device(args.device).type == "cuda":
        properties = torch.cuda.get_device_properties(args.device)
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.max.sm,power.limit",
            "--format=csv,noheader",
        ]
        try:
            asked = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            asked = "unknown"
        found |= {
            "memory, GiB": round(properties.total_memory / 2**30, 1), "CUDA": torch.version.cuda,
            "multiprocessors": properties.multi_processor_count, "driver, highest clock, power limit": asked,
        }  # fmt: skip
    return found


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the body once so many seconds are over; only the main thread can be stopped."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_section(ctx: Context, name: str, seconds: float) -> tuple[list[dict], dict]:
    """The rows of a section, as many as came, and how it ended."""
    rows: list[dict] = []
    start = time.monotonic()
    ctx.ends = start + seconds
    told: dict[str, Any] = {"outcome": "done"}
    try:
        with at_most(seconds + 0.15 * seconds):  # a section looks at the clock by itself
            for row in SECTIONS[name][0](ctx):
                rows.append(row)
    except OutOfTime:
        told = {"outcome": "stopped: its time was over"}
    except Exception as error:
        told = {
            "outcome": f"failed: {type(error).__name__}: {error}"[:300],
            "traceback": traceback.format_exc(),
        }
    return rows, told | {"seconds": round(time.monotonic() - start, 1)}


def run(args: argparse.Namespace, command: str) -> int:
    check_device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * args.minutes - SPARE
    ctx = Context(args.device, args.small)
    about = environment(args, command)
    store.write_json(args.out / "environment.json", about)
    sections: dict[str, tuple[list[dict], dict]] = {
        name: ([], {"outcome": "not run: no time was left", "seconds": 0.0}) for name in args.sections
    }
    for place, name in enumerate(args.sections):
        left = ends - time.monotonic()
        if left < 5:
            break
        to_come = sum(SECTIONS[other][1] for other in args.sections[place:])
        rows, told = run_section(ctx, name, left * SECTIONS[name][1] / to_come / 1.15)
        sections[name] = rows, told
        if not any(other in LARGE for other in args.sections[place + 1 :]):
            ctx.free()
        write(args.out, about, sections)
        print(f"{name}: {told['outcome']}, {told['seconds']} s", flush=True)
        if "traceback" in told:
            print(told["traceback"], file=sys.stderr, flush=True)
    write(args.out, about, sections)
    print((args.out / "report.md").read_text(encoding="utf-8").partition("\n## ")[0])
    return 0 if all(told["outcome"] == "done" for _, told in sections.values()) else 1


def write(folder: Path, about: dict, sections: dict[str, tuple[list[dict], dict]]) -> None:
    """Rows and table as they are now."""
    lines = []
    for name, (rows, told) in sections.items():
        lines += [json.dumps({"section": name} | row) for row in [told, *rows]]
    store.write_atomically(folder / "records.jsonl", "".join(f"{line}\n" for line in lines).encode())
    store.write_atomically(folder / "report.md", markdown(about, sections).encode())


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    return guarded(lambda: run(args, command_of("gpu_report", argv)), "finished sections are kept")


if __name__ == "__main__":
    raise SystemExit(main())
