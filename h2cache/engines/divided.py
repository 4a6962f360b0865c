"""How blocks of two streams divide into modules."""

from __future__ import annotations

from typing import Any

from torch import nn

from h2cache.engines.base import Modules


def double_block(attention: nn.Module, img_mlp: nn.Module, txt_mlp: nn.Module) -> Modules:
    """A block with one attention of both streams, which gives (img, txt), and an mlp of each.

    Of models whose output is that of the image tokens: text is only there for their attention.
    """
    modules = {"attn": attention, "ff": img_mlp, "ff_context": txt_mlp}
    return Modules(modules, text={"attn": "second", "ff_context": "all"})


class DividedBlocks:
    """Blocks under the names which FLUX.1 and HunyuanVideo share: double ones, and single ones, fused."""

    joined_text = "first"  # where the single blocks have the text tokens, or "last"

    def modules(self, block: Any) -> Modules:
        """How `block` divides into modules; see `Engine.modules`."""
        if hasattr(block, "ff"):
            return double_block(block.attn, block.ff, block.ff_context)
        # A single block adds one projection of attention and mlp side by side.
        idle = (block.attn, block.proj_mlp)
        return Modules({"total": block.proj_out}, idle, text={"total": self.joined_text})
