"""What this machine is called, for records."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch


def device_name(device: str | torch.device | None = None) -> str:
    """Name of the processor or accelerator that is computed on; None: the accelerator, if there is one."""
    kind = None if device is None else torch.device(device).type
    if kind == "cpu" or not torch.accelerator.is_available():
        return cpu_name()
    accelerator = str(torch.accelerator.current_accelerator())
    module: Any = getattr(torch, accelerator, None)
    return module.get_device_name() if hasattr(module, "get_device_name") else accelerator


def cpu_name() -> str:
    """The processor's model name; where the system does not say it, its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
