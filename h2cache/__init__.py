"""H2-Cache: training-free caching for diffusion transformers (arXiv 2510.27171).

import h2cache
h2cache.enable(pipe, h2cache.H2Config(tau1=0.15, tau2=0.22))
image = pipe("a sign").images[0]
print(h2cache.summary(pipe))
h2cache.disable(pipe)
"""

import importlib
from typing import Any

from h2cache.api import disable, enable, step_records, summary
from h2cache.drop_in import apply_cache_on_pipe, apply_cache_on_transformer
from h2cache.h2 import H2Cache, H2Config
from h2cache.method import Method, MethodConfig, find_method, method_names
from h2cache.records import StepRecord, Summary

__all__ = [
    "H2Cache",
    "H2Config",
    "H2FluxTransformer2DModel",
    "H2NunchakuFluxTransformer2DModelV2",
    "H2NunchakuFluxTransformer2dModel",
    "Method",
    "MethodConfig",
    "StepRecord",
    "Summary",
    "apply_cache_on_pipe",
    "apply_cache_on_transformer",
    "disable",
    "enable",
    "find_method",
    "method_names",
    "step_records",
    "summary",
]


_SUBCLASSES = {
    "H2FluxTransformer2DModel": "flux_subclass",
    "H2NunchakuFluxTransformer2DModelV2": "nunchaku_subclass",
    "H2NunchakuFluxTransformer2dModel": "nunchaku_subclass",
}


def __getattr__(name: str) -> Any:
    """The subclass forms, imported on demand: importing h2cache imports no model library."""
    if name in _SUBCLASSES:
        return getattr(importlib.import_module(f"h2cache.engines.{_SUBCLASSES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
