"""Decisions on numbers."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from h2cache.policies import SmartThreshold, below


@given(st.floats(allow_nan=True, allow_infinity=True), st.floats(0, allow_infinity=True))
def test_below_is_strict_and_refuses_what_is_not_finite(change, threshold):
    assert below([change], [threshold]) == [math.isfinite(change) and change < threshold]


def test_smart_threshold_is_low_at_the_ends_and_high_in_the_middle():
    smart = SmartThreshold()
    bells = [smart.bell(i, 50) for i in range(50)]
    assert bells == pytest.approx(bells[::-1])
    assert smart.lowest < bells[0] < 0.1
    assert 0.49 < max(bells) <= smart.highest
    assert bells[:25] == sorted(bells[:25])


def test_smart_threshold_reacts_to_changes_and_has_a_floor():
    smart = SmartThreshold()
    mean = None
    for _ in range(40):
        mean = smart.update(mean, 0.3)
    assert mean == pytest.approx(0.3, abs=0.01)
    assert smart.threshold(25, 50, mean) == pytest.approx(smart.highest - mean)
    assert smart.threshold(25, 50, 9.0) == smart.lowest
    assert smart.update(mean, math.nan) == mean
    assert smart.update(None, 0.4) == pytest.approx(0.05)
