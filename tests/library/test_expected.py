"""What to expect of a picture: the gaps of a run, compared with the usual ones, and what they mean in dB."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from h2cache.expected import PLACES, Gap, Sample, Seen, between, compared, fit, gaps_of, usual_gaps

STEPS = 20
EVALUATED = {4: (0, 6, 12, 18), 5: (0, 4, 9, 14, 18), 6: (0, 3, 7, 11, 15, 18)}


def gaps(evaluated, change=0.1, error=0.01) -> tuple[Gap, ...]:
    """Changes grow with a gap's length, errors with its square."""
    return tuple(Gap(a, b, change * (b - a), error * (b - a) ** 2) for a, b in pairwise(evaluated))


def pictures(count, seed=0):
    """How much further than usual each output moves, and how much more its lines miss: factors."""
    return 10 ** (np.random.default_rng(seed).normal(0, 0.15, (count, 2)))


def samples(factors, psnr) -> list[Sample]:
    """The same pictures by three plans."""
    return [
        Sample(
            count,
            STEPS,
            [gaps(steps, 0.1 * change, 0.01 * error) for change, error in factors],
            [psnr(count, change, error) for change, error in factors],
        )
        for count, steps in EVALUATED.items()
    ]


def decibel(factor) -> float:
    return 20 * math.log10(factor)


@given(st.floats(0.2, 5), st.floats(0.2, 5), st.sampled_from([*EVALUATED.values()]))
def test_a_picture_is_compared_at_the_same_places_whatever_its_steps(change, error, steps):
    found = compared(gaps(steps, 0.1 * change, 0.01 * error), gaps(steps), STEPS)
    assert found[: len(PLACES)] == pytest.approx([decibel(change)] * len(PLACES))
    assert found[len(PLACES) :] == pytest.approx([decibel(error)] * len(PLACES))


def test_the_newest_gap_counts_for_what_has_not_come_yet():
    usual = gaps(EVALUATED[6])
    first, *rest = usual
    double = Gap(first.start, first.end, 2 * first.change, first.error)
    found = compared([double], usual, STEPS)
    assert found == pytest.approx([decibel(2)] * len(PLACES) + [0.0] * len(PLACES))
    assert compared([double, *rest], usual, STEPS)[len(PLACES) - 1] == pytest.approx(0.0)


def test_gaps_of_other_steps_are_not_compared():
    assert compared(gaps((0, 5, 10)), gaps((0, 4, 10)), STEPS) == pytest.approx(np.zeros(2 * len(PLACES)))


@given(st.integers(0, 17), st.integers(1, 10))
def test_a_gap_that_a_plan_has_not_is_as_those_around_it(start, length):
    usual = tuple(Gap(a, b, 0.1 * (b - a), 0.01 * (b - a) ** 3) for a, b in pairwise(EVALUATED[5]))
    found = between(usual, start, start + length)
    assert found.error == pytest.approx(0.01 * length**3)
    assert all(between(usual, gap.start, gap.end).error == pytest.approx(gap.error) for gap in usual)


@pytest.mark.parametrize("odd", [0.0, math.nan, math.inf])
def test_what_is_no_number_is_left_out(odd):
    usual = gaps(EVALUATED[4])
    mine = [Gap(g.start, g.end, odd, odd) for g in usual]
    assert compared(mine, usual, STEPS) == pytest.approx(np.zeros(2 * len(PLACES)))
    assert compared(usual, mine, STEPS) == pytest.approx(np.zeros(2 * len(PLACES)))


def test_gaps_are_read_for_each_image():
    change, error = torch.tensor([1.0, 2.0]), torch.tensor([0.25, 0.5])
    found = gaps_of([(3, Seen(0, change, error)), (4, Seen(3, 2 * change, None))])
    assert found == [
        (Gap(0, 3, 1.0, 0.25), Gap(3, 4, 2.0, 0.0)),
        (Gap(0, 3, 2.0, 0.5), Gap(3, 4, 4.0, 0.0)),
    ]
    assert gaps_of([]) == []


def test_the_usual_is_the_geometric_mean():
    both = [gaps(EVALUATED[4], 0.1, 0.01), gaps(EVALUATED[4], 0.4, 0.04)]
    for found, wanted in zip(usual_gaps(both), gaps(EVALUATED[4], 0.2, 0.02), strict=True):
        assert (found.start, found.end) == (wanted.start, wanted.end)
        assert (found.change, found.error) == pytest.approx((wanted.change, wanted.error), rel=1e-4)


def test_what_sets_pictures_apart_is_learnt():
    def psnr(count, change, error):
        return 30 + 2 * count - (1 + 4 / count) * decibel(change) - 0.5 * decibel(error)

    estimate, weights = fit(samples(pictures(60), psnr))
    assert estimate.weighted_error < 0.3
    for (count, steps), own in zip(EVALUATED.items(), weights, strict=True):
        for change, error in pictures(10, seed=1):
            seen = compared(gaps(steps, 0.1 * change, 0.01 * error), gaps(steps), STEPS)
            expected = -(1 + 4 / count) * decibel(change) - 0.5 * decibel(error)
            assert own[0] + seen @ np.array(own[1:]) == pytest.approx(30 + 2 * count + expected, abs=1.2)


def test_a_plan_has_weights_of_its_own():
    """By one plan the changes mean nothing, by the others much."""

    def psnr(count, change, error):
        return 40 - decibel(error) - (count != 5) * 2 * decibel(change)

    _, weights = fit(samples(pictures(400), psnr))
    four, five, six = (sum(own[1 : 1 + len(PLACES)]) for own in weights)
    assert (four, five, six) == (
        pytest.approx(-2, abs=0.3),
        pytest.approx(0, abs=0.3),
        pytest.approx(-2, abs=0.3),
    )


def test_a_few_pictures_that_fail_do_not_lower_the_others():
    """As where a letter turns into another, which no gap shows."""
    broken = iter([True] * 3 + [False] * 27 + [True] * 3 + [False] * 27 + [True] * 3 + [False] * 27)
    _, weights = fit(samples(pictures(30), lambda count, change, error: 50.0 - 20 * next(broken)))
    assert [own[0] for own in weights] == pytest.approx([50.0] * 3, abs=0.5)


def test_its_error_is_that_of_pictures_it_was_not_learnt_from():
    values = np.random.default_rng(2).normal(40, 3, 1000)
    drawn = iter(values)
    estimate, _ = fit(samples(pictures(30), lambda *_: next(drawn)))  # chance alone: nothing to learn
    assert estimate.weighted_error > values[:90].std()


@pytest.mark.parametrize("count", [1, 2, 7])
def test_few_pictures_teach_nothing(count):
    assert fit(samples(pictures(count), lambda k, change, error: 40 - decibel(error) + k)) == (None, [()] * 3)


def test_the_line_is_the_least_squares_one_over_all():
    factors = [(1.0, 10 ** (-n / 20)) for n in range(8)]
    one = samples(factors, lambda count, change, error: 0.0)[0]
    totals = [sum(g.error for g in own) for own in one.pictures]
    exact = Sample(4, STEPS, one.pictures, [7.0 - 2.0 * decibel(total) for total in totals])
    found, _ = fit([exact])
    assert (found.slope, found.offset, found.error) == (2.0, pytest.approx(7.0), 0.0)
    assert found.psnr(one.pictures[0]) == pytest.approx(exact.values[0])
    assert found.psnr(()) == 100.0


def test_equal_pictures_teach_nothing():
    assert fit(samples(pictures(9), lambda *_: 100.0)) == (None, [()] * 3)
    assert fit([]) == (None, [])
