"""The fixed latent space: principal components of 4x8x8x3 space-time patches, laid out as AutoencoderKLWan's.

    python -m analysis.tiny_wan.latents        # fits the basis on 1200 clips, writes pca_basis.npz

Wan's VAE gives the first frame a latent frame of its own and every four frames after it one more. So does
this
space: the first frame is taken as four equal ones, so that both kinds share one basis. Because the space is
fixed before anything is trained, transformer and VAE can be trained in any order. A new basis makes both
useless.
"""

import random
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from analysis.recipes import basis_of, fit_command
from analysis.tiny_wan.clips import FRAMES, SIZE, render, sample_spec

PATCH, GROUP = 8, 4  # the VAE's factors in space and time
CHANNELS = 16
GRID = SIZE // PATCH  # latents per side
LATENT_FRAMES = 1 + (FRAMES - 1) // GROUP
BASIS_FILE = Path(__file__).with_name("pca_basis.npz")


@lru_cache
def basis() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean patch (768,), components (768, CHANNELS) and their scales."""
    return basis_of(BASIS_FILE, CHANNELS)


def patches(clips: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 17, H, W, 3) to values in -1..1, (B, 5, H/8, W/8, 768)."""
    clips = torch.cat([clips[:, :1].expand(-1, GROUP, -1, -1, -1), clips[:, 1:]], 1)  # (B, 20, H, W, 3)
    batch, frames, height, width, _ = clips.shape
    values = clips.float() / 127.5 - 1
    values = values.reshape(batch, frames // GROUP, GROUP, height // PATCH, PATCH, width // PATCH, PATCH, 3)
    return values.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)


@lru_cache
def kernel() -> tuple[torch.Tensor, torch.Tensor]:
    """The projection as weights and bias of a strided convolution, which is nearly three times as fast."""
    mean, components, scales = basis()
    weights = (components / scales).view(GROUP, PATCH, PATCH, 3, CHANNELS).permute(4, 3, 0, 1, 2)
    return weights.contiguous(), -(mean + 1) @ components / scales


def to_latent(clips: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 17, H, W, 3) to latents (B, 16, 5, H/8, W/8)."""
    values = (clips.float() / 127.5).permute(0, 4, 1, 2, 3)  # one more than the value: the bias knows
    values = torch.cat([values[:, :, :1].expand(-1, -1, GROUP, -1, -1), values[:, :, 1:]], 2)
    projection = (part.to(clips.device) for part in kernel())
    return torch.nn.functional.conv3d(values, *projection, stride=(GROUP, PATCH, PATCH))


def from_latent(latents: torch.Tensor) -> torch.Tensor:
    """The linear decoder: latents (B, 16, 5, h, w) to uint8 (B, 17, 8h, 8w, 3)."""
    mean, components, scales = basis()
    batch, _, frames, height, width = latents.shape
    values = (latents.permute(0, 2, 3, 4, 1) * scales) @ components.T + mean
    values = values.reshape(batch, frames, height, width, GROUP, PATCH, PATCH, 3).permute(
        0, 1, 4, 2, 5, 3, 6, 7
    )
    clips = values.reshape(batch, frames * GROUP, height * PATCH, width * PATCH, 3)[:, GROUP - 1 :]
    return ((clips + 1) * 127.5).round().clamp(0, 255).byte()


def fit(count: int, seed: int) -> dict[str, np.ndarray]:
    """Principal components of the patches of `count` clips."""
    rng = random.Random(seed)
    total, outer, seen = 0.0, 0.0, 0
    for _ in range(count):
        frames = torch.from_numpy(render(sample_spec(rng), rng))[None]
        values = patches(frames).reshape(-1, GROUP * PATCH * PATCH * 3).double().numpy()
        total, outer, seen = total + values.sum(0), outer + values.T @ values, seen + len(values)
    mean = total / seen
    variance, vectors = np.linalg.eigh(outer / seen - np.outer(mean, mean))
    print(f"{CHANNELS} components keep {variance[-CHANNELS:].sum() / variance.sum():.4f} of the variance")
    vectors, variance = vectors[:, ::-1][:, :CHANNELS], variance[::-1][:CHANNELS]
    return {"mean": mean, "components": vectors, "variance": variance}


def main() -> None:
    fit_command(__doc__, BASIS_FILE, 1200, fit)


if __name__ == "__main__":
    main()
