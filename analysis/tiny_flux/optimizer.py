"""Muon on the block matrices, AdamW on everything else, over one flat fp32 vector of weights."""

import math
from collections import defaultdict

import torch

MOMENTUM, BETAS, DECAY = 0.95, (0.9, 0.98), 0.02


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz iteration in bf16 on a stack (k, rows, columns): singular values go to about 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.transpose(1, 2) if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    return (x.transpose(1, 2) if tall else x).float()


class MuonAdamW:
    def __init__(self, transformer: torch.nn.Module, device: str = "cpu") -> None:
        self.groups: dict[tuple[int, int], list[slice]] = defaultdict(list)
        size = sum(p.numel() for p in transformer.parameters())
        self.decayed = torch.zeros(size, device=device)
        adam = torch.zeros(size, dtype=torch.bool)
        start = 0
        for name, parameter in transformer.named_parameters():
            place = slice(start, start + parameter.numel())
            start = place.stop
            if parameter.ndim == 2:
                self.decayed[place] = DECAY
            if parameter.ndim == 2 and "transformer_blocks" in name and "norm" not in name:
                self.groups[tuple(parameter.shape)].append(place)
            else:
                adam[place] = True
        self.adam = adam.nonzero()[:, 0].to(device)
        self.momentum = torch.zeros(size, device=device)
        self.first = torch.zeros(len(self.adam), device=device)
        self.second = torch.zeros(len(self.adam), device=device)
        self.steps = 0

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("momentum", "first", "second", "steps")}

    def load_state_dict(self, state: dict) -> None:
        for name in ("momentum", "first", "second"):
            getattr(self, name).copy_(state[name])
        self.steps = state["steps"]

    def step(self, weights: torch.Tensor, gradient: torch.Tensor, rate: float) -> None:
        self.steps += 1
        gradient = gradient / gradient.norm().clamp(min=1.0)
        weights.mul_(1 - rate * self.decayed)
        self.momentum.mul_(MOMENTUM).add_(gradient)
        nesterov = gradient + MOMENTUM * self.momentum
        for shape, places in self.groups.items():
            updates = orthogonalise(torch.stack([nesterov[place].view(shape) for place in places]))
            for place, update in zip(places, updates, strict=True):
                weights[place].sub_(update.flatten(), alpha=rate * 0.2 * math.sqrt(max(shape)))
        rest = gradient[self.adam]
        self.first.lerp_(rest, 1 - BETAS[0])
        self.second.lerp_(rest * rest, 1 - BETAS[1])
        mean = self.first / (1 - BETAS[0] ** self.steps)
        spread = (self.second / (1 - BETAS[1] ** self.steps)).sqrt()
        weights[self.adam] -= rate * mean / (spread + 1e-8)
