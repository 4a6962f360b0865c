"""Where in the spectrum an image error lies: power of a picture by spatial frequency."""

from __future__ import annotations

import numpy as np
from PIL import Image

BANDS = 16
LOW = 1 / 8  # of the Nyquist frequency: periods of 16 pixels and more, a token of FLUX, are layout


def power(picture: np.ndarray) -> np.ndarray:
    """Power of a grey (H, W) picture in BANDS rings of equal width from 0 to the Nyquist frequency: (BANDS,).

    The mean goes first; a Hann window keeps the edges of the picture from looking like detail. Corners beyond
    the Nyquist frequency count for the last ring.
    """
    height, width = picture.shape
    window = np.hanning(height)[:, None] * np.hanning(width)
    spectrum = np.abs(np.fft.fft2((picture - picture.mean()) * window)) ** 2
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)) * 2  # 1: Nyquist
    ring = np.minimum((radius * BANDS).astype(int), BANDS - 1)
    return np.bincount(ring.ravel(), spectrum.ravel(), BANDS)


def grey(image: Image.Image) -> np.ndarray:
    """(H, W) luminance in [0, 1]."""
    return np.asarray(image.convert("RGB"), float) @ [0.299, 0.587, 0.114] / 255


def error_spectrum(image: Image.Image, uncached: Image.Image) -> np.ndarray:
    """Power of the difference over power of the uncached picture, by ring: (BANDS,).

    A natural picture has most of its power at low frequencies, so the bare error has too; the ratio tells
    which part of what is there was lost. 0: exact, 1: as large as the picture itself at that frequency.
    """
    return power(grey(image) - grey(uncached)) / (power(grey(uncached)) + 1e-12)


def low_and_high(image: Image.Image, uncached: Image.Image) -> dict[str, float]:
    """The error below and above LOW, relative to the picture's own power there; share of the low part."""
    difference, own = power(grey(image) - grey(uncached)), power(grey(uncached))
    cut = round(LOW * BANDS)
    return {
        "low": difference[:cut].sum() / own[:cut].sum(),
        "high": difference[cut:].sum() / own[cut:].sum(),
        "low_share": difference[:cut].sum() / max(difference.sum(), 1e-12),
    }
