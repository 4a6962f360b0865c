"""Blocks of two streams that divide into modules under the names which FLUX.1 and HunyuanVideo share."""

from __future__ import annotations

from typing import Any

from torch import nn

from h2cache.modules import Modules
from h2cache.stages import Stream


class DividedBlocks:
    """What an engine that offers "modules" must tell: double blocks by name, single ones fused."""

    def modules(self, block: nn.Module) -> Modules:
        """How `block` divides into modules; see `Engine.modules`."""
        if hasattr(block, "ff"):  # a double block
            return Modules({"attn": block.attn, "ff": block.ff, "ff_context": block.ff_context})
        # A single block adds one projection of attention and mlp side by side.
        return Modules({"total": block.proj_out}, idle=(block.attn, block.proj_mlp))

    def with_input(self, args: tuple, kwargs: dict[str, Any], stream: Stream) -> tuple[tuple, dict[str, Any]]:
        """A block call's arguments with another stream; see `Engine.with_input`."""
        if args:
            return (stream.img, stream.txt, *args[2:]), kwargs
        return args, kwargs | {"hidden_states": stream.img, "encoder_hidden_states": stream.txt}
