"""H2-Cache: training-free caching for diffusion transformers (arXiv 2510.27171).

import h2cache
h2cache.enable(pipe, h2cache.H2Config(tau1=0.15, tau2=0.22))
image = pipe("a sign").images[0]
print(h2cache.summary(pipe))
h2cache.disable(pipe)
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from h2cache.api import disable, enable, restart, step_records, summary
from h2cache.drop_in import apply_cache_on_pipe, apply_cache_on_transformer
from h2cache.h2 import H2Cache, H2Config
from h2cache.method import Method, MethodConfig
from h2cache.plan import Plan, PlanConfig
from h2cache.records import StepRecord, Summary
from h2cache.registry import find_method, method_names
from h2cache.tuning import tune

__version__ = "0.2.0"  # the one place: pyproject.toml reads it

__all__ = [
    "H2Cache",
    "H2Config",
    "H2FluxTransformer2DModel",
    "H2NunchakuFluxTransformer2DModelV2",
    "H2NunchakuFluxTransformer2dModel",
    "Method",
    "MethodConfig",
    "Plan",
    "PlanConfig",
    "StepRecord",
    "Summary",
    "apply_cache_on_pipe",
    "apply_cache_on_transformer",
    "disable",
    "enable",
    "find_method",
    "method_names",
    "restart",
    "step_records",
    "summary",
    "tune",
]


def _find_baselines() -> None:
    """In a bare checkout the folder of `h2cache.baselines` stands beside this one, not in it."""
    beside = Path(__file__).resolve().parent.parent / "baselines"
    if importlib.util.find_spec("h2cache.baselines") is None and (beside / "__init__.py").is_file():
        spec = importlib.util.spec_from_file_location(
            "h2cache.baselines", beside / "__init__.py", submodule_search_locations=[str(beside)]
        )
        assert spec is not None and spec.loader is not None  # noqa: PT018
        module = sys.modules["h2cache.baselines"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        globals()["baselines"] = module  # as the import of a package below this one would


_find_baselines()

_SUBCLASSES = {
    "H2FluxTransformer2DModel": "flux",
    "H2NunchakuFluxTransformer2DModelV2": "nunchaku",
    "H2NunchakuFluxTransformer2dModel": "nunchaku",
}


def __getattr__(name: str) -> Any:
    """The subclass forms, imported on demand: importing h2cache imports no model library."""
    if name in _SUBCLASSES:
        return getattr(importlib.import_module(f"h2cache.models.{_SUBCLASSES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
