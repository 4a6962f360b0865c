"""Fidelity of an image to the uncached one of the same prompt, seed and steps.

torchmetrics in float64 on [0, 1]: in float32 identical images give an SSIM below 1.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) float64 in [0, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), np.float64) / 255).permute(2, 0, 1)[None]


def fidelity(image: Image.Image, uncached: Image.Image) -> dict[str, float | bool | None]:
    """PSNR in dB and SSIM of `image` against `uncached`; identical images have no PSNR (null), SSIM 1."""
    x, y = to_tensor(image), to_tensor(uncached)
    if torch.equal(x, y):
        return {"psnr": None, "ssim": 1.0, "identical": True}
    return {
        "psnr": round(peak_signal_noise_ratio(x, y, data_range=1.0).item(), 3),
        "ssim": round(structural_similarity_index_measure(x, y, data_range=1.0).item(), 5),
        "identical": False,
    }
