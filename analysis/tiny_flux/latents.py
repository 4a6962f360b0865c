"""The fixed latent space: principal components of 8x8x3 patches, and FLUX's packing of latents into tokens.

    python -m analysis.tiny_flux.latents        # fits the basis on 1500 signs, rewrites pca_basis.npz

Because the space is fixed before anything is trained, the transformer and the VAE can be trained at the same
time.
The file that is shipped is the prototype's: a new basis makes every transformer and VAE trained before
useless.
"""

import random
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from analysis.recipes import basis_of, fit_command
from analysis.tiny_flux.signs import SIZE, render, sample_spec

PATCH = 8  # the VAE's factor
CHANNELS = 16  # latent channels
GRID = SIZE // PATCH  # latents per side
SIDE = GRID // 2  # tokens per side: FLUX packs 2x2 latents into one token
TOKENS = SIDE * SIDE
BASIS_FILE = Path(__file__).with_name("pca_basis.npz")


@lru_cache
def basis() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean patch (192,), components (192, CHANNELS) and their scales."""
    return basis_of(BASIS_FILE, CHANNELS)


def patches(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) to values in -1..1, (B, H/8, W/8, 192)."""
    batch, height, width, _ = images.shape
    values = images.float() / 127.5 - 1
    values = values.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH, 3)
    return values.permute(0, 1, 3, 2, 4, 5).flatten(3)


def to_latent(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) to latents (B, 16, H/8, W/8)."""
    mean, components, scales = (t.to(images.device) for t in basis())
    return ((patches(images) - mean) @ components / scales).permute(0, 3, 1, 2).contiguous()


def from_latent(latents: torch.Tensor) -> torch.Tensor:
    """The linear decoder: latents (B, 16, h, w) to uint8 (B, 8h, 8w, 3)."""
    mean, components, scales = (t.to(latents.device) for t in basis())
    batch, _, height, width = latents.shape
    values = (latents.permute(0, 2, 3, 1) * scales) @ components.T + mean
    values = values.reshape(batch, height, width, PATCH, PATCH, 3).permute(0, 1, 3, 2, 4, 5)
    images = values.reshape(batch, height * PATCH, width * PATCH, 3)
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, 16, h, w) to tokens (B, h/2 * w/2, 64), in FLUX's order."""
    batch, channels, height, width = latents.shape
    tokens = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(batch, height // 2 * (width // 2), channels * 4)


def unpack(tokens: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """Tokens (B, side * side, 64) to latents (B, 16, 2 side, 2 side)."""
    batch, _, width = tokens.shape
    latents = tokens.reshape(batch, side, side, width // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(batch, width // 4, side * 2, side * 2)


def img_ids(side: int = SIDE) -> torch.Tensor:
    """Positions of the image tokens, (side * side, 3) with (0, row, column)."""
    ids = torch.zeros(side, side, 3)
    ids[..., 1] = torch.arange(side)[:, None]
    ids[..., 2] = torch.arange(side)[None]
    return ids.reshape(-1, 3)


def fit(count: int, seed: int) -> dict[str, np.ndarray]:
    """Principal components of the patches of `count` signs."""
    rng = random.Random(seed)
    images = torch.from_numpy(np.stack([render(sample_spec(rng), rng) for _ in range(count)]))
    values = patches(images).reshape(-1, PATCH * PATCH * 3).numpy()
    variance, vectors = np.linalg.eigh(np.cov(values[::5].T))
    variance, vectors = variance[::-1][:CHANNELS], vectors[:, ::-1][:, :CHANNELS]
    return {"mean": values.mean(0), "components": vectors, "variance": variance}


def main() -> None:
    fit_command(__doc__, BASIS_FILE, 1500, fit)


if __name__ == "__main__":
    main()
