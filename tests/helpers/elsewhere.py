"""Tensors that say they are on an accelerator."""

import torch


class Elsewhere(torch.Tensor):
    """A tensor that says it is on an accelerator, and counts how often it is brought to the host."""

    reads = 0

    @property
    def device(self):
        return torch.device("cuda")

    def item(self):
        Elsewhere.reads += 1
        return super().item()

    def tolist(self):
        Elsewhere.reads += 1
        return super().tolist()


def elsewhere(value: float) -> torch.Tensor:
    return torch.full((2,), value).as_subclass(Elsewhere)
