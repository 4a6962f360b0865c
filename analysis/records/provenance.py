"""Where figures come from: the command, the machine with its versions, and the date, in one form."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from analysis.records import store
from h2cache.machine import device_name


def provenance(module: str, device: str | torch.device | None, argv: Sequence[str] | None = None) -> dict:
    """Command, machine and date, for the records of `analysis.MODULE`."""
    return {"command": command_of(module, argv), "machine": machine(device), "date": now()}


def command_of(module: str, argv: Sequence[str] | None = None) -> str:
    """The command line of a script, for its records."""
    return f"python -m analysis.{module} {' '.join(sys.argv[1:] if argv is None else argv)}".strip()


def machine(device: str | torch.device | None = None) -> dict[str, Any]:
    """What the figures were taken on.

    device: what was computed on; None: this machine's accelerator.
    """
    return {
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }


def now() -> str:
    """Date and time, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def write_about(folder: Path, module: str, args: argparse.Namespace) -> None:
    """Write `about.json`: where the records in `folder` come from, and all settings."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    about = provenance(module, args.device) | {"settings": settings}
    store.write_atomically(folder / "about.json", (json.dumps(about, indent=1) + "\n").encode())


def source_of(folder: Path) -> str:
    """Where the records in `folder` come from, in a line for a figure's words."""
    for name in ("about.json", "table.json", "summary.json"):
        if about := store.read_json(folder / name):
            return in_words(about)
    return f"records of {folder}"


def in_words(about: dict) -> str:
    """A `provenance` as a line."""
    machine = about["machine"]
    return f"`{about['command']}`, {machine['device_name']}, {machine['threads']} thread(s), {about['date']}"
