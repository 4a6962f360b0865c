"""nunchaku's quantized FLUX.1 with H2-Cache built in, as classes to load instead of the plain ones.

Needs the nunchaku wheel and a GPU that it supports; without them the import says what to install.
"""

from __future__ import annotations

from typing import Any

from h2cache.api import enable
from h2cache.method import MethodConfig
from h2cache.nunchaku_install import require_nunchaku

require_nunchaku()

from nunchaku import NunchakuFluxTransformer2dModel, NunchakuFluxTransformer2DModelV2  # noqa: E402


def _with_cache(loaded: Any, config: MethodConfig | None) -> Any:
    """What a `from_pretrained` gave, with a cache enabled on the transformer in it."""
    with_metadata = isinstance(loaded, tuple)  # return_metadata=True
    enable(loaded[0] if with_metadata else loaded, config)
    return loaded


class H2NunchakuFluxTransformer2DModelV2(NunchakuFluxTransformer2DModelV2):
    """`NunchakuFluxTransformer2DModelV2` with a cache enabled: text to image, one image at a time.

    Same files and arguments; gives the plain model with the cache on it. `h2cache.enable(model, config)`
    changes the settings, `h2cache.disable(model)` takes the cache off.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, cache_config: MethodConfig | None = None, **kwargs: Any) -> Any:
        """As the parent's, with `cache_config`: the settings of the method, by default `H2Config()`."""
        return _with_cache(NunchakuFluxTransformer2DModelV2.from_pretrained(*args, **kwargs), cache_config)


class H2NunchakuFluxTransformer2dModel(NunchakuFluxTransformer2dModel):
    """`NunchakuFluxTransformer2dModel` (V1) with a cache enabled: also LoRA, ControlNet, batches, offload.

    Same files and arguments; gives the plain model with the cache on it. `h2cache.enable(model, config)`
    changes the settings, `h2cache.disable(model)` takes the cache off.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, cache_config: MethodConfig | None = None, **kwargs: Any) -> Any:
        """As the parent's, with `cache_config`: the settings of the method, by default `H2Config()`."""
        return _with_cache(NunchakuFluxTransformer2dModel.from_pretrained(*args, **kwargs), cache_config)
