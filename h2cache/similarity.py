"""How similar two feature tensors are: pooled feature summaries (PFS) and the relative L1 change.

Source: specs of H2-Cache (arXiv 2510.27171) as in the authors' code, with one correction: the pooling window
is at least 1, so that images of fewer than `target` tokens (512x512) work.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pooling_window(tokens: int, target: int, least: int = 1) -> int:
    """How many tokens a summary averages: as many as leave `target` of them, but `least` of them."""
    return min(max(least, tokens // target), tokens)


def pooled_summary(features: Tensor, target: int, least: int = 1) -> Tensor:
    """Average-pool `features` (B, tokens, C) with a square window over neighbouring tokens and channels.

    The window is k = `pooling_window(tokens, target, least)`, its stride is k too; incomplete windows at the
    end of either axis are dropped. With k = 1 the tensor itself comes back. Returns
    (B, tokens // k, C // k), same dtype.
    """
    k = pooling_window(features.shape[1], target, least)
    return features if k <= 1 else average(features, k)


def average(features: Tensor, tokens: int, channels: int | None = None) -> Tensor:
    """Means of `features` (B, tokens, C) over windows of so many tokens and channels; None: as many."""
    window = tokens, min(tokens if channels is None else channels, features.shape[2])
    return F.avg_pool2d(features.unsqueeze(1), window).squeeze(1)


def magnitude(features: Tensor, per_sample: bool = True) -> Tensor:
    """Sum of |features| in float32: (B,), or (1,) over the batch."""
    wider = None if features.dtype == torch.float32 else torch.float32
    if per_sample:
        return torch.linalg.vector_norm(features, 1, (1, 2), dtype=wider)
    return torch.linalg.vector_norm(features, 1, dtype=wider).reshape(1)


def difference(reference: Tensor, current: Tensor, per_sample: bool = True) -> Tensor:
    """Sum of |reference - current| in float32: (B,), or (1,) over the batch."""
    if reference.dtype != torch.float32:
        reference, current = reference.float(), current.float()
    return magnitude(reference - current, per_sample)


def relative_l1(
    reference: Tensor, current: Tensor, per_sample: bool = True, scale: Tensor | None = None
) -> Tensor:
    """mean|reference - current| / mean|reference| in float32: (B,), or (1,) over the batch as the authors do.

    scale: `magnitude(reference)` where it is known. Both means are over as many elements, so sums do. A zero
    reference gives inf or nan, which no threshold accepts: the caller computes.
    """
    if scale is None:
        scale = magnitude(reference, per_sample)
    return difference(reference, current, per_sample) / scale


def settled(features: Tensor) -> Tensor:
    """`features` to be kept: cut off from what recorded gradients, if anything did."""
    return features.detach() if features.requires_grad else features


def sample_mask(hits: Sequence[bool], like: Tensor) -> Tensor:
    """(B, 1, 1) boolean mask of the samples that hit, on the device of `like`."""
    return torch.tensor(list(hits), device=like.device).view(-1, *[1] * (like.ndim - 1))
