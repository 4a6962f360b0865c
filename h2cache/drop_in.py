"""nunchaku's `apply_cache_on_pipe` with nunchaku's names and defaults, on this library.

For scripts written for nunchaku or for the authors' H2-Cache: change the import, keep the call. Differences:
no class is patched, `h2cache.disable(pipe)` undoes it, and with two checks a structure hit forces the detail
hit and the checks are pooled (H2-Cache), where nunchaku's double cache asks both, on whole tensors.
"""

from __future__ import annotations

from typing import Any

from h2cache.api import enable
from h2cache.h2 import H2Config
from h2cache.method import MethodConfig
from h2cache.registry import find_method

SINGLE_DEFAULT = 0.1  # of the authors' H2-Cache; nunchaku has none and switches the check off


def apply_cache_on_pipe(
    pipe: Any,
    *,
    use_double_fb_cache: bool = False,
    residual_diff_threshold: float = 0.12,
    residual_diff_threshold_multi: float | None = None,
    residual_diff_threshold_single: float | None = None,
) -> Any:
    """Cache the pipeline's transformer; a second call changes the thresholds. Returns `pipe`.

    use_double_fb_cache: two checks, H2-Cache (True), or one, Block Cache (False, the default).
    residual_diff_threshold: threshold of the only check, default 0.12.
    residual_diff_threshold_multi: threshold of the double blocks' check, in place of the former.
    residual_diff_threshold_single: threshold of the single blocks' check, default 0.1.
    A negative first threshold switches the cache off; a negative second one that check.
    """
    first, second = residual_diff_threshold_multi, residual_diff_threshold_single
    first = residual_diff_threshold if first is None else first
    second = SINGLE_DEFAULT if second is None else second
    if first < 0:
        config: MethodConfig = find_method("none")()
    elif use_double_fb_cache:
        config = H2Config(tau1=first, tau2=max(second, 0.0))
    else:
        block_cache: Any = find_method("block_cache")
        config = block_cache(threshold=first)
    return enable(pipe, config)


def apply_cache_on_transformer(transformer: Any, **thresholds: Any) -> Any:
    """Cache the transformer, with the keywords of `apply_cache_on_pipe`. Returns `transformer`."""
    return apply_cache_on_pipe(transformer, **thresholds)
