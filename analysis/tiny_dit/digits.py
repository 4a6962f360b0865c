"""The data: scikit-learn's 1,797 scans of handwritten digits, enlarged to 64x64, split, gently varied.

    python -m analysis.tiny_dit.digits --sheet digits.png     # look at scans, enlarged, varied

A scan is 8x8; each value counts the inked dots (0 to 16) in a 4x4 block of a black-and-white bitmap.
Enlarging looks for the smooth black-on-white picture whose 6x6 means are the scan's values again
(back-projection).
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

SIDE, CELL, MARGIN = 64, 6, 8  # the scan fills 48x48, so that strokes do not touch the frame
CLASSES = 10
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT = 5  # every fifth scan of a class


@dataclass(frozen=True)
class Digits:
    """Pictures (N, 1, 64, 64) from -1 (ink) to 1 (paper), and their classes."""

    pictures: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load_scans() -> tuple[torch.Tensor, torch.Tensor]:
    """(1797, 1, 8, 8) from 0 (paper) to 1 (ink), and classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit("the scans come with scikit-learn: pip install scikit-learn") from error
    found = load_digits()
    return torch.from_numpy(found.images).float()[:, None] / 16, torch.from_numpy(found.target).long()


def enlarge(scans: torch.Tensor, rounds: int = 12, steepness: float = 12.0) -> torch.Tensor:
    """Pictures of the scans; their means over the 6x6 cells are the scans' values to about 0.01."""
    wanted = F.pad(scans, (1, 1, 1, 1))  # paper around, so that the outer cells have a neighbour
    guess = wanted.clone()
    for _ in range(rounds + 1):
        smooth = F.interpolate(guess, scale_factor=CELL, mode="bicubic", align_corners=False)
        ink = torch.sigmoid((smooth - 0.5) * steepness)
        guess = guess + 0.5 * (wanted - F.avg_pool2d(ink, CELL))
    border = (SIDE - ink.shape[-1]) // 2
    return 1 - 2 * F.pad(ink, (border,) * 4)


def to_scans(pictures: torch.Tensor) -> torch.Tensor:
    """The scan that a picture would give: (N, 1, 8, 8) from 0 to 1, inverse of `enlarge`."""
    inner = pictures[..., MARGIN:-MARGIN, MARGIN:-MARGIN]
    return F.avg_pool2d((1 - inner) / 2, CELL)


def split(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the training scans and of the held-out ones, a fifth of every class, by a fixed shuffle."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(CLASSES):
        held[shuffled[labels[shuffled] == label][::HELD_OUT]] = True
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def load() -> tuple[Digits, Digits]:
    """Training and held-out digits."""
    scans, labels = load_scans()
    pictures = enlarge(scans)
    return tuple(Digits(pictures[part], labels[part]) for part in split(labels))


def vary(pictures: torch.Tensor, generator: torch.Generator, strength: float = 1.0) -> torch.Tensor:
    """Turned by up to 7 degrees, scaled, sheared and stretched by 6 %, moved by 2 pixels, bent by about 1."""
    count = len(pictures)

    def uniform(*shape: int) -> torch.Tensor:
        return (torch.rand(*shape, generator=generator) * 2 - 1) * strength

    angle = uniform(count) * 0.12
    cos, sin = torch.cos(angle), torch.sin(angle)
    turn = torch.stack([cos, -sin, sin, cos], -1).view(count, 2, 2)
    form = torch.eye(2) + 0.06 * uniform(count, 2, 2)
    shift = uniform(count, 2, 1) * 2 * 2 / SIDE
    grid = F.affine_grid(torch.cat([turn @ form, shift], -1), list(pictures.shape), align_corners=False)
    bend = torch.randn(count, 2, 5, 5, generator=generator) * strength * 2 / SIDE
    bend = F.interpolate(bend, size=SIDE, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    ink = F.grid_sample(1 - pictures, grid + bend, mode="bicubic", align_corners=False)
    return (1 - ink).clamp(-1, 1)


def sheet(rows: list[torch.Tensor]) -> Image.Image:
    """One line of pictures for each tensor (N, 1, 64, 64)."""
    lines = [torch.cat(list(row[:, 0]), dim=1) for row in rows]
    return Image.fromarray((torch.cat(lines) * 127.5 + 127.5).round().clamp(0, 255).byte().numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sheet", type=Path, default=Path("digits.png"))
    args = parser.parse_args()
    scans, labels = load_scans()
    pictures = enlarge(scans)
    error = (to_scans(pictures) - scans).abs()
    train, held = split(labels)
    print(f"{len(train)} training scans, {len(held)} held out, cell means off by {error.mean():.4f}")
    shown = torch.from_numpy(np.arange(20))
    blocks = F.pad(1 - 2 * F.interpolate(scans[shown], scale_factor=CELL), (MARGIN,) * 4, value=1)
    generator = torch.Generator().manual_seed(0)
    varied = [vary(pictures[shown], generator) for _ in range(3)]
    sheet([blocks, pictures[shown], *varied]).save(args.sheet)


if __name__ == "__main__":
    main()
