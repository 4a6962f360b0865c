"""Which model: one file per family, found by the class names that it serves."""

from __future__ import annotations

import importlib
import pkgutil

from torch import nn

from h2cache.engines.base import Engine
from h2cache.engines.whole import WholeModel


def engines() -> list[Engine]:
    """An engine of each class that the files of this folder define."""
    names = [m.name for m in pkgutil.iter_modules(__path__)]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    classes = [(c, m.__name__) for m in modules for c in vars(m).values() if getattr(c, "serves", ())]
    return [c() for c, module in classes if c.__module__ == module]  # not those that a file imports


def find_engine(transformer: nn.Module) -> Engine:
    """The engine that serves `transformer`; TypeError names the class and the known ones."""
    known = engines()
    serving = {served: engine for engine in known for served in engine.serves}
    transformer = getattr(transformer, "_orig_mod", transformer)  # wrapped by torch.compile
    for base in type(transformer).__mro__:  # the nearest base: nunchaku's classes inherit diffusers'
        if base.__name__ in serving:
            return serving[base.__name__]
    raise TypeError(
        f"no engine for {type(transformer).__name__}: h2cache serves {', '.join(e.name for e in known)}. "
        "A new model is one file in h2cache/engines/, see the README.md there."
    )


def whole_engine(denoiser: nn.Module) -> Engine:
    """The engine that serves `denoiser`, else one that knows no more of it than its call."""
    try:
        return find_engine(denoiser)
    except TypeError:
        return WholeModel(denoiser)
