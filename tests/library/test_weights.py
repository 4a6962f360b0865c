"""Forecasting rules against their closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h2cache import weights
from tests.helpers.curves import exponentials


def forecast(row, values) -> float:
    return float(np.dot(row, values))


gaps = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@given(gaps, st.floats(0.1, 12), st.floats(-3, 3), st.floats(-3, 3))
def test_order_one_is_exact_on_lines_with_any_gaps(gaps, x, a, b):
    times = np.cumsum([0, *gaps]).astype(float)
    at = times[-1] + x
    for rule in (lambda: weights.taylor(times, at, 1), lambda: weights.newton(times, at, 1)):
        assert forecast(rule(), a + b * times) == pytest.approx(a + b * at, abs=1e-9)


@given(gaps, st.floats(0.1, 12), st.integers(0, 4))
def test_every_rule_keeps_a_constant(gaps, x, order):
    times = np.cumsum([0, *gaps]).astype(float)
    at = times[-1] + x
    rows = [
        weights.last(times, at),
        weights.taylor(times, at, order),
        weights.newton(times, at, order),
        weights.hermite(times, at, min(order, 1), 0.5),
        weights.taylor_scaled(times, at, order, 0.5),
        weights.dmd(times, at, np.ones((len(times),) * 2))[0],
    ]
    for row in rows:
        assert len(row) == len(times)
        assert math.fsum(row) == pytest.approx(1, abs=1e-6 * sum(map(abs, row)))


@pytest.mark.parametrize(("s", "g", "x"), [(6, 2, 1), (10, 3, 2), (20, 6, 5)])
def test_taylor_of_order_two_errs_by_minus_g_x_on_squares_and_newton_does_not(s, g, x):
    times = [float(s - 2 * g), float(s - g), float(s)]
    squares = [t * t for t in times]
    assert forecast(weights.taylor(times, s + x, 2), squares) == pytest.approx((s + x) ** 2 - g * x)
    assert forecast(weights.newton(times, s + x, 2), squares) == pytest.approx((s + x) ** 2)


def test_newton_is_exact_on_squares_with_any_gaps_and_in_between():
    times = [0.0, 2.0, 7.0]
    for x in (3.0, 9.0, 20.0):
        assert forecast(weights.newton(times, x, 2), [t * t for t in times]) == pytest.approx(x * x)


def test_fewer_residuals_lower_the_order():
    assert weights.taylor([4.0], 6.0, 3) == [1.0]
    assert weights.newton([4.0], 6.0, 3) == [1.0]
    assert weights.taylor([4.0, 5.0], 7.0, 3) == [-2.0, 3.0]
    assert weights.taylor([1.0, 4.0, 5.0], 7.0, 0) == [0.0, 0.0, 1.0]


def test_hermite_polynomials_are_those_of_the_table():
    table = [
        lambda u: 1,
        lambda u: 2 * u,
        lambda u: 4 * u**2 - 2,
        lambda u: 8 * u**3 - 12 * u,
        lambda u: 16 * u**4 - 48 * u**2 + 12,
    ]
    for n, closed in enumerate(table):
        for u in (-1.5, 0.0, 0.3, 2.0):
            assert weights.hermite_polynomial(n, u) == pytest.approx(closed(u))


@given(st.floats(0.05, 1), st.integers(1, 8))
def test_hermite_terms_are_the_closed_forms(sigma, x):
    times, s2 = [0.0, 4.0, 8.0, 12.0], sigma**2
    rows = weights.differences(times, 3)
    factors = [1, 2 * s2 * x, 2 * s2**2 * x**2 - s2, 4 / 3 * s2**3 * x**3 - 2 * s2**2 * x]
    for order in (1, 2, 3):
        expected = sum(f * np.array(r) for f, r in zip(factors[: order + 1], rows, strict=False))
        assert weights.hermite(times, 12.0 + x, order, sigma) == pytest.approx(expected)


def test_hermite_with_half_for_sigma_squared_is_taylor_and_zero_is_reuse():
    times = [1.0, 2.0, 8.0]
    for x in range(1, 7):
        assert weights.hermite(times, 8.0 + x, 1, math.sqrt(0.5)) == pytest.approx(
            weights.taylor(times, 8.0 + x, 1)
        )
        assert weights.taylor_scaled(times, 8.0 + x, 2, 1.0) == weights.taylor(times, 8.0 + x, 2)
        assert weights.hermite(times, 8.0 + x, 2, 1e-4) == pytest.approx([0, 0, 1], abs=1e-6)
    rising = forecast(weights.hermite(times, 11.0, 2, 0.5), times)
    assert 8.0 < rising < 11.0  # the sign of the horizon


# Dynamic mode decomposition.


@pytest.mark.parametrize("modes", [(0.9,), (0.97, 1.02), (0.95 * np.exp(0.3j),), (1.0, 0.98 * np.exp(0.2j))])
@pytest.mark.parametrize("gap", [1, 3])
def test_dmd_is_exact_on_exponentials(modes, gap):
    count = max(4, 1 + sum(1 + (np.iscomplex(m)) for m in modes))
    times = [float(gap * n) for n in range(count)]
    curve = exponentials(times, *modes)
    for x in (1, 2, 3):
        row, who = weights.dmd(times, times[-1] + x, curve.T @ curve, tolerance=1e-7, trust=None)
        truth = exponentials([times[-1] + x], *modes)[:, 0]
        assert who == "dmd"
        assert np.linalg.norm(curve @ row - truth) < 1e-6 * np.linalg.norm(truth)


def test_dmd_of_a_line_is_the_line():
    times, rng = [0.0, 2.0, 4.0, 6.0], np.random.default_rng(1)
    a, b = rng.standard_normal((2, 500))
    curve = a[:, None] + b[:, None] * np.array(times)
    for x in (1.0, 2.0, 3.5):
        row, _ = weights.dmd(times, 6.0 + x, curve.T @ curve)
        assert np.allclose(curve @ row, a + b * (6 + x), atol=1e-5)
    assert weights.dmd(times, 6.0, curve.T @ curve)[0] == pytest.approx([0, 0, 0, 1], abs=1e-9)


def test_dmd_in_gram_form_is_the_svd_form():
    rng = np.random.default_rng(2)
    snapshots = np.cumsum(rng.standard_normal((1000, 5)) * 0.1, axis=1) + rng.standard_normal((1000, 1))
    times, k = [0.0, 1.0, 2.0, 3.0, 4.0], 2
    before, after = snapshots[:, :-1], snapshots[:, 1:]
    u, s, vt = np.linalg.svd(before, full_matrices=False)
    eigenvalues, w = np.linalg.eig(u.T @ after @ vt.T / s)
    modes = after @ vt.T @ np.diag(1 / s) @ w
    amplitudes = np.linalg.lstsq(modes, snapshots[:, -1].astype(complex), rcond=None)[0]
    direct = np.real(modes @ (eigenvalues**k * amplitudes))
    row, who = weights.dmd(times, 6.0, snapshots.T @ snapshots, trust=None)
    assert who == "dmd"
    assert np.allclose(snapshots @ row, direct, atol=1e-8 * np.linalg.norm(direct))


def test_dmd_falls_back():
    curve = exponentials([0, 1, 2, 3, 4, 6], 0.9, 1.05)
    gram = curve.T @ curve
    assert weights.dmd([7.0], 9.0, gram[:1, :1]) == ([1.0], "reuse")
    two, who = weights.dmd([2.0, 4.0], 5.0, gram[:2, :2])
    assert (two, who) == ([-0.5, 1.5], "taylor")
    uneven, who = weights.dmd([0.0, 1, 2, 3, 4, 6], 7.0, gram)  # the tail of equal gaps is two long
    assert (uneven, who) == (weights.taylor([0.0, 1, 2, 3, 4, 6], 7.0, 1), "taylor")
    late = [1.0, 5.0, 6.0, 7.0, 8.0, 9.0]  # what lies before the equal gaps does not count
    alone = weights.dmd(late[1:], 11.0, gram[1:, 1:])[0]
    assert weights.dmd(late, 11.0, gram)[0] == [0.0, *alone]
    gram[0, 0] = math.nan
    assert weights.dmd([0.0, 1, 2, 3, 4, 5], 7.0, gram)[1] == "reuse"
    assert weights.dmd([0.0, 1, 2, 3], 5.0, np.zeros((4, 4)))[0] == [0, 0, 0, 1]


def test_dmd_trusts_growth_only_so_far():
    times = [0.0, 1.0, 2.0, 3.0]
    curve = exponentials(times, 3.0)
    row, _ = weights.dmd(times, 5.0, curve.T @ curve)
    moved = np.linalg.norm(curve @ row - curve[:, -1])
    assert moved <= 1.5 * 2 * np.linalg.norm(curve[:, -1] - curve[:, -2]) * (1 + 1e-9)


@settings(max_examples=50)
@given(st.floats(1e-3, 1e3), st.integers(1, 4))
def test_dmd_does_not_depend_on_the_scale(scale, x):
    curve = exponentials([0, 1, 2, 3, 4], 0.9, 1.02)
    plain = weights.dmd([0.0, 1, 2, 3, 4], 4.0 + x, curve.T @ curve)[0]
    scaled = weights.dmd([0.0, 1, 2, 3, 4], 4.0 + x, scale**2 * curve.T @ curve)[0]
    assert scaled == pytest.approx(plain, rel=1e-4, abs=1e-4)


def test_dmd_takes_the_real_part_of_a_complex_answer():
    """A mode of the eigenvalue -0.9, asked for between two steps."""
    times = [0.0, 2.0, 4.0, 6.0, 8.0]
    a, b = np.random.default_rng(0).standard_normal((2, 200))
    at = lambda k: a + b * (complex(-0.9) ** k).real  # noqa: E731
    curve = np.stack([at(n) for n in range(5)], 1)
    row, who = weights.dmd(times, 9.0, curve.T @ curve, tolerance=1e-7, trust=None)
    assert who == "dmd"
    assert np.allclose(curve @ row, at(4.5), atol=1e-6)
