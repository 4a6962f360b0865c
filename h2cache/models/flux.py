"""FLUX.1 of diffusers with H2-Cache built in, as a class to load instead of the plain one."""

from __future__ import annotations

from typing import Any

from diffusers import FluxTransformer2DModel

from h2cache.api import enable
from h2cache.method import MethodConfig


class H2FluxTransformer2DModel(FluxTransformer2DModel):
    """`FluxTransformer2DModel` that comes with a cache enabled, H2-Cache by default.

    Loads the plain model's folders and hub ids, and gives the plain model with the cache on it: a pipeline of
    it can be saved, and loaded where h2cache is not installed. `h2cache.enable(model, config)` changes the
    settings, `h2cache.disable(model)` takes the cache off.
    """

    @classmethod
    def from_pretrained(
        cls, *args: Any, cache_config: MethodConfig | None = None, **kwargs: Any
    ) -> FluxTransformer2DModel:
        """As the parent's, with `cache_config`: the settings of the method, by default `H2Config()`."""
        return enable(FluxTransformer2DModel.from_pretrained(*args, **kwargs), cache_config)
