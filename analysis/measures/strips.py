"""Pictures and videos kept as strips of frames: their error, and its change from frame to frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def frames_of(path: Path) -> np.ndarray:
    """(frames, height, width, 3) of a picture, or of a strip of frames as high as wide."""
    strip = np.asarray(Image.open(path).convert("RGB"))
    return np.stack(np.split(strip, strip.shape[1] // strip.shape[0], axis=1))


def psnr(frames: np.ndarray, uncached: np.ndarray) -> float | None:
    """Mean over frames, dB; None for equal ones."""
    error = np.square(frames.astype(float) - uncached).mean((1, 2, 3))
    return None if not error.all() else float((10 * np.log10(255**2 / error)).mean())


def flicker(frames: np.ndarray, uncached: np.ndarray) -> float | None:
    """Mean error of the change from frame to frame, 8-bit levels; None for a picture."""
    error = np.diff(frames.astype(float), axis=0) - np.diff(uncached.astype(float), axis=0)
    return float(np.abs(error).mean()) if len(frames) > 1 else None
