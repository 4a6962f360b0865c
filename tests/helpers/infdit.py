"""The small Inf-DiT of `analysis.tiny_infdit` with random weights, and a picture for it."""

import torch
from torch import Tensor

from analysis.tiny_infdit.model import SCALE, DiffusionEngine, enlarge
from h2cache.engines.infdit import Upscaler


def make_infdit(seed: int = 0, **sizes: int) -> DiffusionEngine:
    """One of random weights."""
    torch.manual_seed(seed)
    return DiffusionEngine(**sizes).eval().requires_grad_(False)


def picture(height: int = 32, width: int = 32, batch: int = 1, seed: int = 0) -> dict:
    """Arguments of `sample` for a low-resolution picture of a quarter of that size."""
    g = torch.Generator().manual_seed(seed)
    small = torch.rand(batch, 3, height // SCALE, width // SCALE, generator=g) * 2 - 1
    large = enlarge(small)
    noise = torch.randn(large.shape, generator=g)
    return {"shape": tuple(large.shape), "images": large, "lr_imgs": small, "noise": noise}


class Evaluated(Upscaler):
    """Asked for a number of evaluations, of which Heun's n steps take 2 n - 1."""

    def __call__(self, num_inference_steps: int, generator=None, **kwargs) -> Tensor:
        return super().__call__(num_steps=(num_inference_steps + 1) // 2, **kwargs)
