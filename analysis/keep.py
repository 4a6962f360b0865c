"""Keeping what was computed: files written whole or not at all, and one record for each image.

Files go to a temporary name in the same folder and are then renamed: a killed run leaves no half file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import platform
import re
import shutil
import warnings
from dataclasses import asdict
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image

from h2cache import MethodConfig


class BrokenLine(UserWarning):
    """A line of records that cannot be read."""


def temporary(path: Path, process: int | None = None) -> Path:
    """Where `process` (default: this one) of this machine writes what is to become `path`."""
    return path.with_name(f".{path.name}.{HOST}.{process or os.getpid()}.tmp")


HOST = re.sub(r"[^A-Za-z0-9-]", "_", platform.node()) or "local"  # folders may be shared between machines
TEMPORARY = re.compile(rf"\..+\.{HOST}\.(\d+)\.tmp")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    half = temporary(path)
    try:
        with open(half, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove the temporary files of processes of this machine that were killed while they wrote."""
    for path in folder.rglob(".*.tmp"):
        match = TEMPORARY.fullmatch(path.name)
        if match and not _runs(int(match[1])):
            path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Whether a process of this number may be running on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def save_png(path: Path, image: Image.Image) -> None:
    """Save an image atomically."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def run_key(**settings: Any) -> str:
    """A short hash of everything that decides how an image looks and what it costs."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_records(path: Path) -> dict[str, dict]:
    """The rows of a `records.jsonl` (or .jsonl.gz) by key.

    A broken line is left out with a warning that names it, and kept in `NAME.broken` beside the file, since
    the next `write_records` leaves it out too.
    """
    rows, broken = {}, []
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
            rows[row["key"]] = row
        except (ValueError, KeyError, TypeError):
            broken.append(line)
            warnings.warn(f"{path} line {number} is broken and left out", BrokenLine, stacklevel=2)
    if broken:
        _keep_broken(path.with_name(f"{path.name}.broken"), broken)
    return rows


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data.decode("utf-8", "replace").splitlines()


def _keep_broken(path: Path, broken: list[str]) -> None:
    kept = _lines(path)
    new = [line for line in broken if line not in kept]
    try:
        if new:
            write_atomically(path, "".join(f"{line}\n" for line in [*kept, *new]).encode())
    except OSError as error:  # such as a folder that may only be read: nothing will delete the line either
        warnings.warn(f"{path}: {error}", BrokenLine, stacklevel=3)


def write_records(path: Path, rows: dict[str, dict]) -> None:
    """Write all rows, one JSON object a line, atomically."""
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows.values())
    write_atomically(path, text.encode())


def write_json(path: Path, row: dict) -> None:
    """Write one JSON object, atomically."""
    write_atomically(path, (json.dumps(row, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict | None:
    """The object in a file of `write_json`; None if there is none, or none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def compact(trace: list[dict]) -> list[dict]:
    """Step records by branch and stage, short: one line for all steps.

    outcomes: H hit, F forced hit, M miss. measures, thresholds: null where nothing was compared or finite;
    one threshold for all steps stands alone.
    """
    lines: dict[tuple[str, str], dict] = {}
    for record in trace:
        line = lines.setdefault(
            (record["branch"], record["stage"]),
            {"branch": record["branch"], "stage": record["stage"], "blocks": record["blocks"], "outcomes": ""}
            | {"blocks_run": [], "measures": [], "thresholds": []},
        )
        line["outcomes"] += record["outcome"][0].upper()
        line["blocks_run"].append(record["blocks_run"])
        for many, one in (("measures", "measure"), ("thresholds", "threshold")):
            value = record[one]
            line[many].append(float(f"{value:.4g}") if isinstance(value, float) else None)
    for line in lines.values():
        values = {value for value in line["thresholds"] if value is not None}
        if len(values) < 2:
            line["thresholds"] = values.pop() if values else None
    return list(lines.values())


def machine(device: str | torch.device | None = None) -> dict[str, Any]:
    """What the figures were taken on, for the records.

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


def require_space(folder: Path, megabytes: int) -> None:
    """OSError unless the disk of `folder` has this much left."""
    free = shutil.disk_usage(folder).free // 2**20
    if free < megabytes:
        raise OSError(f"{folder}: {free} MiB are free on its disk, the run needs about {megabytes} MiB")


def settings_of(config: MethodConfig) -> dict[str, Any]:
    """The settings as JSON values: infinity, which JSON does not know, as the text "inf"."""
    return {k: str(v) if v == float("inf") else v for k, v in asdict(config).items()}


def now() -> str:
    """Date and time, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
