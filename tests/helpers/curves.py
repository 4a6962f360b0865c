"""Curves whose continuation is known."""

import numpy as np


def exponentials(times, *modes):
    """Columns of a curve in 1000 dimensions: a sum of lambda^t, complex ones with their conjugates."""
    rng = np.random.default_rng(0)
    total = np.zeros((1000, len(times)))
    for mode in modes:
        vector = rng.standard_normal(1000) + 1j * rng.standard_normal(1000)
        total += np.real(vector[:, None] * np.power(complex(mode), np.asarray(times, float)))
    return total
