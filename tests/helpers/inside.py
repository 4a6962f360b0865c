"""What no user sees of a cached transformer: the one place that knows where it is kept."""

from torch import nn

from h2cache.memory import Memory, Request


def request_of(model: nn.Module) -> Request:
    """The newest request of a cached transformer."""
    return model._h2cache.requests.newest


def memory_of(model: nn.Module, branch: str = "cond") -> Memory:
    """What the newest request keeps for a guidance branch."""
    return request_of(model).memories[branch]
