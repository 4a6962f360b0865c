"""Keeping what was computed: files written whole or not at all, and one record for each image.

Files go to a temporary name in the same folder and are then renamed: a killed run leaves no half file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
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


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove the temporary files of processes of this machine that were killed while they wrote."""
    for path in folder.rglob(".*.tmp"):
        process = int(path.suffixes[-2][1:])
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)


def save_png(path: Path, image: Image.Image) -> None:
    """Save an image atomically."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def run_key(**settings: Any) -> str:
    """A short hash of everything that decides how an image looks and what it costs."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_records(path: Path) -> dict[str, dict]:
    """The rows of a `records.jsonl` by key; broken lines are left out with a warning that names them."""
    rows = {}
    if path.is_file():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                rows[row["key"]] = row
            except (ValueError, KeyError, TypeError):
                warnings.warn(f"{path} line {number} is broken and left out", stacklevel=2)
    return rows


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


def machine() -> dict[str, Any]:
    """What the figures were taken on, for the records."""
    return {
        "device_name": device_name(),
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
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return cpu_name()
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
