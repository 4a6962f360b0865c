"""Training pairs: a procedural sign of 512 pixels a side, and the small picture that it is to come from.

Half of the small pictures are the sign scaled down; the other half have gone through the VAE of the embedded
model besides, which blurs them and leaves its marks, as in everything that the embedded model draws.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from analysis.tiny_flux import signs
from analysis.tiny_infdit.model import SCALE


def from_pixels(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) as (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def load_vae(folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder / "vae").float()


@torch.no_grad()
def through_vae(vae: AutoencoderKL, small: Tensor) -> Tensor:
    return vae.decode(vae.encode(small).latent_dist.mode()).sample.clamp(-1, 1)


def pair(spec: signs.SignSpec, rng: random.Random, vae: AutoencoderKL | None) -> tuple[Tensor, Tensor]:
    """A sign, (1, 3, 512, 512), and its small picture, (1, 3, 128, 128), through `vae` if there is one."""
    large = from_pixels(signs.render(spec, rng, enlarged=SCALE))
    small = F.avg_pool2d(large, SCALE)
    small = ((small + 1) * 127.5).round() / 127.5 - 1  # of 8 bits, as in a file
    return large, small if vae is None else through_vae(vae, small)


def crop(large: Tensor, small: Tensor, side: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """A place out of both, `side` pixels of the small one wide: of two by chance that with more in it."""
    found = []
    for _ in range(2):
        y, x = (rng.randrange(length - side + 1) for length in small.shape[2:])
        place = [slice(SCALE * start, SCALE * (start + side)) for start in (y, x)]
        found.append((large[:, :, place[0], place[1]], small[:, :, y : y + side, x : x + side]))
    return max(found, key=lambda pair: pair[1].std((2, 3)).sum().item())


def batch(
    vae: AutoencoderKL, rng: random.Random, pictures: int, each: int, side: int
) -> tuple[Tensor, Tensor]:
    """`each` crops of every one of so many new signs: (pictures * each, 3, ...) large and small."""
    found = []
    for _ in range(pictures):
        large, small = pair(signs.sample_spec(rng), rng, vae if rng.random() < 0.5 else None)
        found += [crop(large, small, side, rng) for _ in range(each)]
    large, small = (torch.cat(parts) for parts in zip(*found, strict=True))
    return large, small
