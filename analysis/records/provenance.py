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
    on_cpu = device is not None and torch.device(device).type == "cpu"
    return {
        "device_name": cpu_name() if on_cpu else device_name(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }


def device_name() -> str:
    """Name of this machine's accelerator, whatever its kind; of its processor where it has none."""
    if not torch.accelerator.is_available():
        return cpu_name()
    accelerator = torch.accelerator.current_accelerator()
    module = getattr(torch, accelerator.type, None)
    return module.get_device_name() if hasattr(module, "get_device_name") else accelerator.type


def cpu_name() -> str:
    """The processor's model name; where the system does not tell it, its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


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
