"""Blocks of two streams that divide into modules under the names which FLUX.1 and HunyuanVideo share."""

from __future__ import annotations

from typing import Any

from h2cache.engines.base import Modules


class DividedBlocks:
    """What an engine that offers "modules" must describe: double blocks by name, single ones fused.

    The output is that of the image tokens: text is only there for their attention.
    """

    joined_text = "first"  # where the single blocks have the text tokens, or "last"

    def modules(self, block: Any) -> Modules:
        """How `block` divides into modules; see `Engine.modules`."""
        if hasattr(block, "ff"):  # a double block
            modules = {"attn": block.attn, "ff": block.ff, "ff_context": block.ff_context}
            return Modules(modules, text={"attn": "second", "ff_context": "all"})
        # A single block adds one projection of attention and mlp side by side.
        idle = (block.attn, block.proj_mlp)
        return Modules({"total": block.proj_out}, idle, text={"total": self.joined_text})
