"""Peak memory of one call, as well as the device can tell."""

from __future__ import annotations

from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """`start()` before the call, `bytes()` after it; `kind` says what is counted.

    "allocated": the accelerator's highest allocation by PyTorch. "resident": the highest resident set of this
    process (Linux, CPU). "unknown": this machine gives neither, `bytes()` gives None.
    """

    def __init__(self, device: torch.device) -> None:
        self._counters = getattr(torch, device.type) if device.type != "cpu" else None
        if hasattr(self._counters, "reset_peak_memory_stats"):
            self.kind = "allocated"
        elif device.type == "cpu" and RESET.exists():
            self.kind = "resident"
        else:
            self.kind = "unknown"

    def start(self) -> None:
        """Forget earlier peaks."""
        if self.kind == "allocated":
            self._counters.reset_peak_memory_stats()
        elif self.kind == "resident":
            try:
                RESET.write_text("5")
            except OSError:  # a sandbox may forbid it, and the peak would be that of the whole process
                self.kind = "unknown"

    def bytes(self) -> int | None:
        """The peak since `start`."""
        if self.kind == "allocated":
            return self._counters.max_memory_allocated()
        if self.kind == "resident":
            line = next(x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        return None
