"""Group offloading of diffusers, where the blocks around one that runs are left out.

A group of blocks is brought to the device by the first of it and put away by the last. A method may run one
from the middle alone, or look at a part of a block without running it: then nobody has brought the weights.
"""

from __future__ import annotations

from torch import nn


def onload(block: nn.Module, unless_leader: bool = False) -> None:
    """Bring the weights of `block` to the device if group offloading may have put them away.

    unless_leader: leave it to the block itself where it is the one that brings its group.
    """
    registry = vars(block).get("_diffusers_hook")
    hook = registry and registry.get_hook("group_offloading")
    if not hook or (unless_leader and hook.group.onload_leader is block):
        return
    hook.group.onload_()
    if hook.group.stream is not None:
        hook.group.stream.synchronize()
