"""H2-Cache: training-free caching for diffusion transformers (arXiv 2510.27171).

import h2cache
h2cache.enable(pipe, h2cache.H2Config(tau1=0.15, tau2=0.22))
image = pipe("a sign").images[0]
print(h2cache.summary(pipe))
h2cache.disable(pipe)
"""

from typing import Any

from h2cache.api import disable, enable, step_records, summary
from h2cache.h2 import H2Cache, H2Config
from h2cache.method import Method, MethodConfig, find_method, method_names
from h2cache.records import StepRecord, Summary

__all__ = [
    "H2Cache",
    "H2Config",
    "H2FluxTransformer2DModel",
    "Method",
    "MethodConfig",
    "StepRecord",
    "Summary",
    "disable",
    "enable",
    "find_method",
    "method_names",
    "step_records",
    "summary",
]


def __getattr__(name: str) -> Any:
    """The subclass forms, imported on demand: importing h2cache imports no model library."""
    if name == "H2FluxTransformer2DModel":
        from h2cache.engines.flux_subclass import H2FluxTransformer2DModel

        return H2FluxTransformer2DModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
