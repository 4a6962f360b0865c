"""What a method says and sees: the vocabulary of its step.

A method is written as one generator (see `h2.py`): it yields `Run` or `Skip` for the next blocks and gets
back what the run saw. `drive.py` carries that out inside the model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from h2cache.similarity import sample_mask


@dataclass(slots=True, eq=False)  # not frozen: a dozen are made at each step
class Stream:
    """The hidden states between two blocks: image tokens (B, I, C) and text tokens (B, S, C)."""

    img: Tensor
    txt: Tensor | None = None

    def map(self, function: Callable[..., Tensor], *others: Stream) -> Stream:
        """Apply `function` to the image tokens of all streams, and to the text tokens if all have some."""
        img, txts = function(self.img, *(o.img for o in others)), [s.txt for s in (self, *others)]
        return Stream(img, None if any(t is None for t in txts) else function(*txts))

    def __add__(self, change: Stream) -> Stream:
        """A change without text leaves the text alone: the last block of SD3 returns none."""
        text = self.txt
        if text is not None and change.txt is not None:
            text = text + change.txt
        return Stream(self.img + change.img, text)

    def __sub__(self, other: Stream) -> Stream:
        text = None if self.txt is None or other.txt is None else self.txt - other.txt
        return Stream(self.img - other.img, text)

    def is_at(self, other: Stream) -> bool:
        """Whether both are the same memory, if perhaps cut again out of a joined tensor."""
        return _same_memory(self.img, other.img) and _same_memory(self.txt, other.txt)

    @property
    def joint(self) -> Tensor:
        """Text tokens first, then image tokens: (B, S + I, C)."""
        return self.img if self.txt is None else torch.cat([self.txt, self.img], dim=1)


def _same_memory(a: Tensor | None, b: Tensor | None) -> bool:
    if a is b or a is None or b is None:
        return a is b
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage as a method sees it: its name and its blocks, numbered through the whole model.

    Stages need not agree with the model's block lists: a stage may be a part of one, or reach over two.
    """

    name: str
    first: int
    last: int  # exclusive
    joint: bool  # compare on text and image tokens together, or on image tokens only

    @property
    def head(self) -> range:
        return range(self.first, self.first + 1)

    @property
    def rest(self) -> range:
        return range(self.first + 1, self.last)

    @property
    def blocks(self) -> range:
        return range(self.first, self.last)

    def measured(self, head: Ran) -> Tensor:
        """The residual that this stage's similarity check looks at, (B, tokens, C): output minus input."""
        return head.change.joint if self.joint else head.img_change


@dataclass(slots=True)
class Run:
    """Execute `blocks`. Samples marked in `kept` take `stand_in` in place of the outcome (mixed batches)."""

    blocks: range
    kept: list[bool] | None = None
    stand_in: Stream | None = None


@dataclass(slots=True)
class Skip:
    """Leave `blocks` out and add `stand_in` to the stream instead."""

    blocks: range
    stand_in: Stream


Answer = Callable[[int, str, Callable, tuple, dict], Any]


@dataclass(slots=True)
class Drive:
    """Let the forward of `blocks` run with `answer` in the place of each of their modules (attention, mlp).

    answer(block index, module name, the module's own forward, args, kwargs) gives the module's output.
    counts: whether the blocks are computed, that is, count as executed and have their idle modules run; see
    `Engine.modules`. Only for methods that list "modules" in `MethodConfig.requires`.
    text: whether `answer` is asked for text tokens too. Without, it sees image tokens only; the text of
    computed blocks passes by, that of others is left as it was. Only where a whole step is either computed or
    answered for: else somebody would read that text.
    """

    blocks: range
    answer: Answer
    counts: bool
    text: bool = True


@dataclass(slots=True)
class Output:
    """Let `answer(forward, args, kwargs)` stand in the place of the model's last layer, after all blocks.

    Only for methods that list "output" in `MethodConfig.requires`.
    """

    answer: Callable[[Callable, tuple, dict], Any]
    blocks: range = range(0)


@dataclass(slots=True)
class Look:
    """Show the input of the next block after its first norm and modulation, (B, I, C); nothing runs yet.

    Only for methods that list "modulated input" in `MethodConfig.requires`.
    """


@dataclass(slots=True)
class Latents:
    """Show what the model is given to denoise, before anything of it runs.

    (B, tokens, C), of the tokens that are drawn, or (B, C, ..., height, width), as the model takes them.
    """


@dataclass(slots=True)
class Forward:
    """Run the whole model; gives back the tensors of its output. Only for methods that require "whole"."""


@dataclass(slots=True)
class Stand:
    """Let `tensors` stand in the place of the model's output; nothing of it runs, unless a `Forward` has."""

    tensors: list[Tensor]


class Ran:
    """What a `Run` saw: the stream before and after it, and what the model added between its blocks."""

    def __init__(self, before: Stream, targets: slice | None = None) -> None:
        self.before = self.after = before
        self.added: Stream | None = None
        self._targets = targets

    def enter(self, x: Stream) -> None:
        """Notice what the model added since the last block, such as a ControlNet residual."""
        if x.is_at(self.after):
            return
        added = x - self.after
        self.added = added if self.added is None else self.added + added

    @property
    def img_change(self) -> Tensor:
        """What the blocks changed of the image tokens that are drawn, not those of a reference: (B, I, C)."""
        change = self._drawn(self.after).img - self._drawn(self.before).img
        return change if self.added is None else change - self._drawn(self.added).img

    def _drawn(self, x: Stream) -> Stream:
        return x if self._targets is None else Stream(x.img[:, self._targets], x.txt)

    @property
    def change(self) -> Stream:
        """What the blocks changed, of the image tokens that are drawn and of the text."""
        change = self._drawn(self.after) - self._drawn(self.before)
        return change if self.added is None else change - self._drawn(self.added)

    @property
    def residual(self) -> Stream:
        """What the blocks alone changed: after - before, less the model's own additions."""
        change = self.after - self.before
        return change if self.added is None else change - self.added

    def replaced(self, kept: list[bool], stand_in: Stream | None) -> Stream:
        """`after`, except that the samples in `kept` are as if the blocks had been skipped."""
        assert stand_in is not None, "samples are kept, and nothing stands in"
        skipped = self.before + stand_in
        if self.added is not None:
            skipped = skipped + self.added
        return self.after.map(lambda new, old: torch.where(sample_mask(kept, new), old, new), skipped)


Command = Run | Skip | Look | Drive | Output
Program = Generator[
    Command | Latents | Forward | Stand, Any, None
]  # a `Run` or `Drive` gives back a `Ran`, a `Look` what it shows


class Driven(Protocol):
    """Blocks that only a call can reach: what an engine without block lists hands to `Call.drive`."""

    def run(self, x: Stream, blocks: range) -> Stream:
        """Execute `blocks`, in one call where the model has one."""

    def added(self, x: Stream, blocks: range) -> Stream | None:
        """What the model itself adds to `x` after `blocks`, executed or not (ControlNet); None: nothing."""

    def modulated_input(self, x: Stream, block: int) -> Tensor:
        """The image tokens (B, I, C) of `x` after the first norm and modulation of `block`."""


class Driver(Protocol):
    """What carries a program out, as an engine without block lists sees it."""

    position: int  # number of the next block, through the whole model; 0: nothing has run yet

    def drive(self, x: Stream, blocks: Driven) -> Stream:
        """Carry out the whole program on `blocks`; returns the stream at its end."""
