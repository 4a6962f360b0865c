"""Finding methods by name: H2-Cache itself, and every file of `baselines/`."""

from __future__ import annotations

import importlib
import importlib.resources
import json
import pkgutil
from types import ModuleType
from typing import Any

from h2cache.method import MethodConfig

OWN = {"h2cache": "h2cache.h2", "plan": "h2cache.plan"}  # methods that are no file of `baselines/`
BASELINES = "h2cache.baselines"


def method_names() -> list[str]:
    """All methods that `find_method` knows: our own, then the files of `baselines/`."""
    package = importlib.import_module(BASELINES)
    return [*OWN, *sorted(m.name for m in pkgutil.iter_modules(package.__path__))]


def find_method(name: str) -> type[MethodConfig]:
    """The configuration class of the method `name`; ValueError lists the known ones."""
    if name not in method_names():
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(method_names())}")
    return _config_class(importlib.import_module(OWN.get(name, f"{BASELINES}.{name}")))


def _config_class(module: ModuleType) -> type[MethodConfig]:
    found = [
        c
        for c in vars(module).values()
        if issubclass(type(c), type)  # inspect.isclass takes dict[int, float] for one in Python 3.10
        and issubclass(c, MethodConfig)
        and c.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one MethodConfig, it defines {len(found)}")
    return found[0]


def fitted_constants(method: str, checkpoint: str | None) -> dict[str, Any]:
    """The constants of `method` fitted to `checkpoint`, with their source: `baselines/constants/METHOD.json`.

    Raises ValueError with the command that fits them when there are none.
    """
    path = importlib.resources.files(BASELINES) / "constants" / f"{method}.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    if checkpoint not in table:
        raise ValueError(
            f"{method} has no constants fitted to {checkpoint or 'this model, which has no name'}, only for "
            f"{', '.join(table)}: fit them in a checkout of the repository with "
            f"`python -m analysis.fit_{method} --model FOLDER --save`, or name the checkpoint that the model "
            f"was made of, as in checkpoint={next(iter(table))}"
        )
    return table[checkpoint]
