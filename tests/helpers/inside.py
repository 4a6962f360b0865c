"""What no user sees: tensors that are kept, and the one place that knows where a cache is."""

import gc

import torch
from torch import nn

from h2cache.memory import Memory


def tensors_alive() -> list[torch.Tensor]:
    """All tensors that somebody still holds."""
    gc.collect()
    return [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]


def memory_of(model: nn.Module, branch: str = "cond") -> Memory:
    """What the newest request keeps for a guidance branch."""
    return model._h2cache.requests.newest.memories[branch]
