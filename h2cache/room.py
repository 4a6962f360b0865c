"""Whether what a method will keep fits into memory, asked before the first block of a request runs."""

from __future__ import annotations

import psutil
import torch

from h2cache.method import MethodConfig, Shape


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be had on `device`; on one that does not tell, of main memory."""
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return psutil.virtual_memory().available
    unused = module.memory_reserved(device) - module.memory_allocated(device)  # torch's own, free for reuse
    return module.mem_get_info(device)[0] + unused


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if abs(count) >= 2**30 else f"{count / 2**20:.1f} MiB"


def require_room(config: MethodConfig, shape: Shape, free: int) -> int:
    """Bytes that `config` keeps for a guidance branch of `shape`; MemoryError if it is more than `free`."""
    needed = config.bytes_needed(shape)
    smaller = ["the order"] * hasattr(config, "order") + ["the image size"]
    what = f"for {shape.img} image tokens (x {shape.batch})"
    advice = f"lower {' or '.join(smaller)}"
    if config.requires:
        advice += config.instead.replace(":", ", or", 1)
    return require_bytes(config, needed, free, what, advice)


def require_bytes(
    config: MethodConfig, needed: int, free: int, what: str = "", advice: str = "lower the image size"
) -> int:
    """`needed`, the bytes that `config` keeps; MemoryError if it is more than `free`."""
    if needed > free:
        raise MemoryError(
            f"{config.name} keeps {_size(needed)} from step to step{what and ' ' + what}, and {_size(free)} "
            f"are free: {advice}"
        )
    return needed
