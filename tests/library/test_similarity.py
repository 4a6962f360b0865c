"""Pooled summaries and the relative change against their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from h2cache.similarity import pooled_summary, relative_l1


@given(st.integers(1, 70), st.integers(1, 20), st.integers(1, 80), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_pooling_is_the_mean_of_square_windows(tokens, channels, target, seed):
    x = torch.randn(2, tokens, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    k = max(1, tokens // target)
    c = min(k, channels)
    pooled = pooled_summary(x, target)
    assert pooled.shape == (2, tokens // k, channels // c)
    i, j = tokens // k - 1, channels // c - 1
    window = x[1, i * k : (i + 1) * k, j * c : (j + 1) * c]
    torch.testing.assert_close(pooled[1, i, j], window.mean())


@pytest.mark.parametrize(
    ("tokens", "target", "shape"),
    [
        (1024, 2048, (1024, 3072)),
        (4096, 2048, (2048, 1536)),
        (4608, 384, (384, 256)),
        (4592, 384, (417, 279)),
    ],
)
def test_pooling_matches_the_table_of_the_specification(tokens, target, shape):
    assert pooled_summary(torch.zeros(1, tokens, 3072), target).shape == (1, *shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pooling_and_change_work_in_every_dtype(dtype):
    x = torch.ones(1, 8, 8, dtype=dtype)
    change = relative_l1(pooled_summary(x, 4), pooled_summary(x * 1.5, 4))
    assert change.dtype == torch.float32
    assert change.item() == pytest.approx(0.5)


def test_change_is_measured_for_each_sample():
    reference = torch.ones(3, 4, 2)
    current = reference * torch.tensor([1.0, 1.1, 3.0])[:, None, None]
    torch.testing.assert_close(relative_l1(reference, current), torch.tensor([0.0, 0.1, 2.0]))
    torch.testing.assert_close(relative_l1(reference, current, per_sample=False), torch.tensor([0.7]))


def test_a_zero_reference_is_never_finite():
    zero = torch.zeros(1, 4, 2)
    assert math.isnan(relative_l1(zero, zero).item())
    assert math.isinf(relative_l1(zero, zero + 1).item())


def test_the_window_can_follow_a_small_picture():
    """Of 512x512 the structure check keeps a quarter, as of 1024x1024, where nothing changes."""
    small, large = torch.zeros(1, 1024, 64), torch.zeros(1, 4096, 64)
    assert pooled_summary(small, 2048).shape == (1, 1024, 64)
    assert pooled_summary(small, 2048, 2).shape == (1, 512, 32)
    assert pooled_summary(large, 2048, 2).shape == pooled_summary(large, 2048).shape
