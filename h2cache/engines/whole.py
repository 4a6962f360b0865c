"""Any denoiser, as far as a method needs to know it that answers for the whole model: no block is named."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from h2cache.engines.base import Engine, Inputs

TIMES = ("timestep", "timesteps", "t")
TEXTS = ("encoder_hidden_states", "prompt_embeds", "class_labels", "text_embeds", "cap_feats")


class WholeModel(Engine):
    """Engine of every other denoiser: it offers no block, only the call of the whole."""

    name = "a model without an engine"
    serves = ()
    cuts = ()
    offers = frozenset({"whole"})

    def __init__(self, denoiser: nn.Module) -> None:
        plain: nn.Module = getattr(denoiser, "_orig_mod", denoiser)
        self._names = _parameters(type(plain))  # type: ignore[arg-type]  # a class is hashable

    def inputs(self, args: tuple, kwargs: dict[str, Any]) -> Inputs:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        latents = given.get(self._names[0] if self._names else "", next(iter(given.values())))
        timestep = next((given[name] for name in TIMES if name in given), None)
        text = next((given[name] for name in TEXTS if given.get(name) is not None), None)
        if timestep is None:
            raise TypeError(f"this model's call has no timestep: it is given {', '.join(given)}")
        return Inputs(
            timestep=torch.as_tensor(timestep),
            latents=_first(latents),
            text=_first(text),
            conditions=tuple(
                sorted((name, *_kind(value)) for name, value in given.items() if name not in TIMES)
            ),
        )


@lru_cache(maxsize=64)
def _parameters(kind: Any) -> tuple[str, ...]:
    """Names of the arguments of the model's call, of the nearest class that names them."""
    names: tuple[str, ...] = ()
    for base in (c for c in kind.__mro__ if "forward" in vars(c)):
        given = tuple(inspect.signature(base.forward).parameters.values())[1:]
        names = tuple(p.name for p in given if p.kind is not p.VAR_POSITIONAL)
        if len(names) == len(given):
            break
    return names


def _first(value: Any) -> Any:
    """A tensor, or the first of a list."""
    return value[0] if isinstance(value, (list, tuple)) and value else value


def _kind(value: Any) -> tuple[str, str]:
    """What must not change in mid-run: whether something is given, and plain values."""
    if isinstance(value, dict):
        return "dict", repr(sorted((k, _kind(v)) for k, v in value.items()))
    if isinstance(value, (list, tuple)):
        return type(value).__name__, str([_kind(item)[0] for item in value])
    plain = value is None or isinstance(value, (bool, int, float, str))
    return type(value).__name__, repr(value) if plain else ""
