"""FLUX.1 in nunchaku (4-bit SVDQuant): V2 with Python blocks, V1 with all blocks behind one compiled handle.

Facts (nunchaku 1.0 to 1.2, models/transformers/transformer_flux*.py and csrc/flux.h):
V2: double blocks as in diffusers; a single block takes and returns one joined tensor, text tokens first.
V1: `transformer_blocks` is one wrapper module; its forward casts, packs the rotary tensors and makes one
call, `m.forward`, of a handle whose per-block calls return (img, txt) and wait for the whole device each
time. They leave out the single blocks' ControlNet samples and PuLID's callback, which are therefore added
here. The handle does not write to its arguments; what it returns is a copy in 0.2 to 1.2, but is not kept as
it is.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from h2cache.engines.base import Cut, Inputs, class_names
from h2cache.engines.flux_diffusers import FluxDiffusers
from h2cache.engines.forms import Joined, TwoStreams
from h2cache.program import Driver, Stream

JOINED = Joined()


def _refuse_nunchaku_cache(transformer: nn.Module) -> None:
    """ValueError if nunchaku's own cache has been applied: it replaces the forward and cannot be undone."""
    if "_original_forward" in vars(transformer) or getattr(transformer, "_is_cached", False):
        raise ValueError(
            "nunchaku's own cache is applied to the transformer: load it again, and call h2cache.enable, or "
            "h2cache.apply_cache_on_pipe with the same arguments, instead of nunchaku's apply_cache_on_pipe"
        )


class FluxNunchakuV2(FluxDiffusers):
    """Engine of `nunchaku.NunchakuFluxTransformer2DModelV2`."""

    name = "NunchakuFluxTransformer2DModelV2 (nunchaku)"
    serves = ("NunchakuFluxTransformer2DModelV2",)
    cuts = (
        Cut("structure", "transformer_blocks", TwoStreams(text_first=True)),
        Cut("detail", "single_transformer_blocks", JOINED, joint=True),
    )
    offers = frozenset({"modulated input", "output"})  # its modules are fused
    trainable = False  # nunchaku's loader leaves its models in training mode; 4-bit weights cannot be trained

    def check(self, transformer: Any) -> None:
        _refuse_nunchaku_cache(transformer)


class FluxNunchakuV1(FluxDiffusers):
    """Engine of `nunchaku.NunchakuFluxTransformer2dModel`: LoRA, ControlNet, PuLID, batches, offload."""

    name = "NunchakuFluxTransformer2dModel (nunchaku)"
    serves = ("NunchakuFluxTransformer2dModel",)
    cuts = (  # the lists are inside the handle, which tells nothing: they are named as the config counts them
        Cut("structure", "num_layers", TwoStreams(text_first=False)),
        Cut("detail", "num_single_layers", JOINED, joint=True),
    )
    offers = frozenset({"modulated input", "output"})
    trainable = False

    def check(self, transformer: Any) -> None:
        wrapper = transformer.transformer_blocks[0]
        if "IPA_TransformerBlocks" in class_names(wrapper):
            raise ValueError(
                "nunchaku's IP-Adapter replaces the transformer's blocks by some that a cache cannot drive: "
                "use a transformer without it, or diffusers' own IP-Adapter with --engine diffusers"
            )
        _refuse_nunchaku_cache(transformer)
        if "NunchakuFluxTransformerBlocks" not in class_names(wrapper):
            raise ValueError("the transformer has no quantized blocks: load it with its from_pretrained")

    def count(self, transformer: Any, cut: Cut) -> int:
        return transformer.config[cut.blocks]

    def take_over(
        self, transformer: Any, firsts: dict[str, int], current_call: Callable[[], Driver | None]
    ) -> Callable[[nn.Module], None]:
        double, single = (range(first, first + transformer.config[k]) for k, first in firsts.items())
        wrapper, handle = transformer.transformer_blocks[0], transformer.transformer_blocks[0].m
        wrapper.m = DrivenHandle(handle, wrapper, double, single, current_call)
        standing = weakref.ref(wrapper)

        def take_out(_: nn.Module) -> None:
            if (wrapper := standing()) is not None:
                wrapper.m = handle

        return take_out

    def inputs(self, args: tuple, kwargs: dict[str, Any]) -> Inputs:
        inputs = super().inputs(args, kwargs)
        return replace(inputs, conditions=(*inputs.conditions, _identity_weight(inputs.timestep, kwargs)))


def _identity_weight(timestep: Tensor, kwargs: dict[str, Any]) -> Any:
    """Weight of PuLID's identity in a call of its forward; None where it is off (at this timestep)."""
    if kwargs.get("id_embeddings") is None:
        return None
    start, end = kwargs.get("start_timestep"), kwargs.get("end_timestep")
    if start is not None or end is not None:
        now = timestep.reshape(-1)[0].item()  # a wait, as PuLID's forward has one for the same question
        if (start is not None and start > now) or (end is not None and end < now):
            return None
    return kwargs.get("id_weight")


def _text(x: Stream) -> Tensor:
    """The text tokens, which FLUX always has."""
    assert x.txt is not None
    return x.txt


class DrivenHandle:
    """Stands before nunchaku's handle in the wrapper: its whole-stack call does what a caching method asks.

    Everything else (LoRA, attention, PuLID's callback, `reset`) reaches the handle itself. It is no second
    wrapper: nunchaku's wrapper resets the handle when it is deleted.
    """

    def __init__(
        self,
        handle: Any,
        wrapper: Any,
        double: range,
        single: range,
        current_call: Callable[[], Driver | None],
    ) -> None:
        self._handle, self._double, self._single = handle, double, single
        self._current_call = current_call
        self._wrapper = weakref.ref(wrapper)  # it holds this object

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        temb: Tensor,
        rotary_img: Tensor,
        rotary_txt: Tensor,
        rotary_joint: Tensor,
        control_double: Tensor | None = None,
        control_single: Tensor | None = None,
        skip_first_layer: bool = False,
    ) -> Tensor:
        """As the handle's: all blocks, (B, I, C) and (B, S, C) to the joined (B, S + I, C), text first."""
        rotary = (rotary_img, rotary_txt, rotary_joint)
        control = (control_double, control_single)
        call = self._current_call()
        if call is None or call.position or skip_first_layer:  # not ours, or a call that was broken off
            return self._handle.forward(img, txt, temb, *rotary, *control, skip_first_layer)
        stack = _Stack(self._handle, self._wrapper(), self._double, self._single, temb, rotary, control)
        return stack.joined(call.drive(Stream(img, txt), stack))


class _Stack:
    """The blocks behind the handle with the arguments of one forward call, for `Call.drive`."""

    def __init__(
        self,
        handle: Any,
        wrapper: Any,
        double: range,
        single: range,
        temb: Tensor,
        rotary: tuple[Tensor, Tensor, Tensor],
        control: tuple[Tensor | None, Tensor | None],  # samples of double and single blocks, (n, B, I, C)
    ) -> None:
        self.handle, self.wrapper, self.temb = handle, wrapper, temb
        self.double, self.single = double, single  # numbered through the whole model
        self.rotary, self.control = rotary, control
        self.pulid = getattr(wrapper, "id_embeddings", None) is not None  # its forward has just set it
        self._newest: tuple[Stream, Tensor] | None = None  # a stream, and the joined tensor that it views

    def run(self, x: Stream, blocks: range) -> Stream:
        if blocks.stop == self.single.stop and blocks.start <= 1:
            return self._split(self._fused(x, skip_first=blocks.start == 1), x)
        img, txt = x.img, _text(x)
        double = range(blocks.start, min(blocks.stop, self.double.stop))
        for index in double:
            img, txt = self.handle.forward_layer(
                index, img, txt, self.temb, self.rotary[0], self.rotary[1], self.control[0], None
            )
            if self.pulid and index % 2 == 0:
                img = img + self._identity(index // 2, img)
        if blocks.stop <= self.double.stop:
            return Stream(img, txt)
        joint = self.joined(Stream(img, txt) if double else x)
        for index in range(max(0, blocks.start - self.single.start), blocks.stop - self.single.start):
            joint = self.handle.forward_single_layer(index, joint, self.temb, self.rotary[2])
            joint = self._after_single(index, joint, txt.shape[1])
        return self._split(joint, x)

    def _fused(self, x: Stream, skip_first: bool) -> Tensor:
        """All blocks, or all but block 0, in one call: one wait for the device instead of one a block."""
        if self.pulid and skip_first:
            self._callback(1)  # the handle leaves out the callback of block 0 too
        return self.handle.forward(x.img, x.txt, self.temb, *self.rotary, *self.control, skip_first)

    def _after_single(self, index: int, joint: Tensor, text_tokens: int) -> Tensor:
        """Add to the image tokens what the whole-stack call adds after a single block."""
        img = whole = joint[:, text_tokens:]
        if self.control[1] is not None:
            interval = math.ceil(len(self.single) / len(self.control[1]))
            img = img + self.control[1][index // interval].to(img.dtype)
        if self.pulid and index % 4 == 0:
            img = img + self._identity(math.ceil(len(self.double) / 2) + index // 4, img)
        return joint if img is whole else Stream(img, joint[:, :text_tokens]).joint

    def _identity(self, number: int, img: Tensor) -> Tensor:
        """The `number`-th addition of PuLID to the image tokens."""
        return self._callback(number)(img.contiguous())

    def _callback(self, number: int) -> Callable[[Tensor], Tensor]:
        """nunchaku's own callback for PuLID, set to begin at its `number`-th call."""
        self.wrapper.pulid_ca_idx = number
        self.wrapper.set_pulid_residual_callback()
        return self.wrapper.callback_holder

    def added(self, x: Stream, blocks: range) -> Stream | None:
        total = None
        for samples, stage in zip(self.control, (self.double, self.single), strict=True):
            if samples is None:
                continue
            interval = math.ceil(len(stage) / len(samples))
            uses = Counter((index - stage.start) // interval for index in blocks if index in stage)
            for number, times in uses.items():
                term = samples[number].to(x.img.dtype) * times
                total = term if total is None else total + term
        return None if total is None else Stream(total, _text(x).new_zeros(()))

    def modulated_input(self, x: Stream, block: int) -> Tensor:
        return self.handle.norm_one_forward(block, x.img.contiguous(), self.temb.contiguous())[0].clone()

    def _split(self, joint: Tensor, like: Stream) -> Stream:
        stream = JOINED.read_output(joint, _text(like).shape[1])
        self._newest = (stream, joint)
        return stream

    def joined(self, x: Stream) -> Tensor:
        """The text and image tokens of `x` in one tensor; no copy where they come from one."""
        return self._newest[1] if self._newest and self._newest[0] is x else x.joint
