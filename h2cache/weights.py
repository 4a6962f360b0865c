"""How much of each stored residual makes a forecast: pure numbers, no tensor, no model.

Every rule here answers with weights w, one for each stored residual (oldest first), such that the forecast is
sum_j w_j R_j. `times` are those of the stored residuals, rising: step indices, or -sigma (`predictors.py`);
`x` is the time asked for. Weights are Python floats or float64; they add up to 1, so a constant is kept.

Sources: TaylorSeer (arXiv 2503.06923), HiCache (arXiv 2508.16984) and their authors' code for `taylor` and
`hermite`; divided differences for `newton`; Schmid 2010 and cache-dit's DMD calibrator for `dmd`, here in
its Gram form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Times = Sequence[float]


def last(times: Times, x: float) -> list[float]:
    """Reuse: the newest residual."""
    return [0.0] * (len(times) - 1) + [1.0]


def differences(times: Times, order: int) -> list[list[float]]:
    """The finite differences at the newest time, of order 0 up to `order`, as weights.

    The authors' rule: every order is divided by the newest gap alone. Exact slopes for order 1; from order 2
    on exact only where the gaps are equal.
    """
    n = len(times)
    rows: list[list[float]] = []
    for j in range(n):
        new = [[float(i == j) for i in range(n)]]
        gap = times[j] - times[j - 1]
        for old in rows[:order]:
            new.append([(a - b) / gap for a, b in zip(new[-1], old, strict=True)])
        rows = new
    return rows


def _sum(factors: Sequence[float], rows: list[list[float]]) -> list[float]:
    return [math.fsum(f * row[j] for f, row in zip(factors, rows, strict=True)) for j in range(len(rows[0]))]


def taylor(times: Times, x: float, order: int) -> list[float]:
    """TaylorSeer: sum_i D_i k^i / i!, k = time since the newest residual."""
    rows, k = differences(times, order), x - times[-1]
    return _sum([k**i / math.factorial(i) for i in range(len(rows))], rows)


def hermite_polynomial(n: int, u: Any) -> Any:
    """Physicists' Hermite polynomial H_n(u), of a number or of each number of a tensor."""
    before, now = 0.0, 1.0 + 0.0 * u
    for i in range(n):
        before, now = now, 2 * u * now - 2 * i * before
    return now


def hermite(times: Times, x: float, order: int, sigma: float) -> list[float]:
    """HiCache: sum_i D_i sigma^i H_i(sigma k) / i!, the contraction sigma applied twice (dual scaling)."""
    rows, k = differences(times, order), x - times[-1]
    factors = [sigma**i * hermite_polynomial(i, sigma * k) / math.factorial(i) for i in range(len(rows))]
    return _sum(factors, rows)


def taylor_scaled(times: Times, x: float, order: int, sigma: float) -> list[float]:
    """HiCache's ablation: the dual scaling without Hermite, sum_i D_i (sigma^2 k)^i / i!."""
    return taylor(times, times[-1] + sigma**2 * (x - times[-1]), order)


def newton(times: Times, x: float, order: int) -> list[float]:
    """The polynomial through the newest `order` + 1 residuals, exact for any gaps; also between them."""
    nodes = list(times[-(order + 1) :])
    weights = [0.0] * (len(times) - len(nodes))
    for i, a in enumerate(nodes):
        weights.append(math.prod((x - b) / (a - b) for j, b in enumerate(nodes) if j != i))
    return weights


def dmd(
    times: Times, x: float, gram: np.ndarray, tolerance: float = 1e-4, trust: float | None = 1.5
) -> tuple[list[float], str]:
    """Dynamic mode decomposition from the Gram matrix of the stored residuals, and who answered.

    Only the newest run of equal gaps counts. Four residuals are needed; fewer fall back to a straight line,
    one to reuse, and so does whatever is not finite. Of a complex answer (an eigenvalue below 0 to a
    fractional power) the real part is taken, as cache-dit does.
    tolerance: smallest singular value kept, of the largest.
    trust: the forecast moves at most `trust` * k times as far as the last two residuals lie apart; None: no
    limit. Returns (weights, "dmd" | "taylor" | "reuse").
    """
    m = len(times)
    if m == 1:
        return last(times, x), "reuse"
    if not np.isfinite(gram).all():
        return last(times, x), "reuse"
    gap = times[-1] - times[-2]
    tail = 2
    while tail < m and math.isclose(times[-tail] - times[-tail - 1], gap, rel_tol=1e-6):
        tail += 1
    k = (x - times[-1]) / gap
    if tail < 4:
        return taylor(times, x, 1), "taylor"
    g = gram[-tail:, -tail:]
    change = _mode_change(g, k, tolerance)
    if not np.isfinite(change).all():
        return last(times, x), "reuse"
    if trust is not None:
        moved, step = float(change @ g @ change), float(g[-1, -1] - 2 * g[-1, -2] + g[-2, -2])
        limit = (trust * k) ** 2 * max(step, 0.0)
        if moved > limit:
            change = change * math.sqrt(limit / moved)
    change[-1] += 1.0
    return [0.0] * (m - tail) + change.tolist(), "dmd"


def _mode_change(g: np.ndarray, k: float, tolerance: float) -> np.ndarray:
    """Weights of forecast minus newest residual at horizon `k` gaps."""
    n = len(g) - 1
    values, vectors = np.linalg.eigh(g[:n, :n])
    singular = np.sqrt(np.maximum(values, 0.0))
    if singular[-1] == 0.0:
        return np.zeros(n + 1)
    keep = singular > tolerance * singular[-1]
    t = vectors[:, keep] / singular[keep]  # (n, r)
    eigenvalues, w = np.linalg.eig(t.T @ g[:n, 1:] @ t)  # of the map from one residual to the next
    q = t @ w
    # Amplitudes: least squares through a root of the Gram matrix; normal equations fail on straight lines.
    values, vectors = np.linalg.eigh(g[1:, 1:])
    root = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
    amplitudes = np.linalg.lstsq(root @ q, root[:, -1].astype(complex), rcond=None)[0]
    with np.errstate(all="ignore"):
        c = q @ ((eigenvalues.astype(complex) ** k - 1) * amplitudes)
    return np.concatenate([[0.0], c.real])
