"""Blocks of two streams that divide into modules under the names which FLUX.1 and HunyuanVideo share."""

from __future__ import annotations

from typing import Any

from h2cache.engines.base import Modules


class DividedBlocks:
    """What an engine that offers "modules" must describe: double blocks by name, single ones fused."""

    def modules(self, block: Any) -> Modules:
        """How `block` divides into modules; see `Engine.modules`."""
        if hasattr(block, "ff"):  # a double block
            return Modules({"attn": block.attn, "ff": block.ff, "ff_context": block.ff_context})
        # A single block adds one projection of attention and mlp side by side.
        return Modules({"total": block.proj_out}, idle=(block.attn, block.proj_mlp))
