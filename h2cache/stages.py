"""Where a model can be cut, and how a method's step drives the model's own forward through the cuts.

A method is written as one generator (see `h2.py`): it yields `Run` or `Skip` for the next blocks and gets
back what the run saw. The model's forward stays untouched: its block lists are replaced by `Stage` lists,
and iterating one of them inside a cached forward asks the generator what to hand out, a real block with a
tap on it, or a pass-through. So whatever the model does between its blocks (ControlNet residuals, for one)
still happens, at every step, fresh.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from h2cache.similarity import sample_mask

if TYPE_CHECKING:
    from h2cache.engines import Engine
    from h2cache.memory import Memory


@dataclass(frozen=True, slots=True)
class Stream:
    """The hidden states between two blocks: image tokens (B, I, C) and text tokens (B, S, C)."""

    img: Tensor
    txt: Tensor | None = None

    def map(self, function: Callable[..., Tensor], *others: Stream) -> Stream:
        """Apply `function` to the image tokens of all streams, and to the text tokens where there are any."""
        img = function(self.img, *(o.img for o in others))
        return Stream(img, None if self.txt is None else function(self.txt, *(o.txt for o in others)))

    def __add__(self, other: Stream) -> Stream:
        return Stream(self.img + other.img, None if self.txt is None else self.txt + other.txt)

    def __sub__(self, other: Stream) -> Stream:
        return Stream(self.img - other.img, None if self.txt is None else self.txt - other.txt)

    @property
    def joint(self) -> Tensor:
        """Text tokens first, then image tokens: (B, S + I, C)."""
        return self.img if self.txt is None else torch.cat([self.txt, self.img], dim=1)


@dataclass(frozen=True, slots=True)
class Span:
    """A stage as a method sees it: its name and its blocks, numbered through the whole model."""

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
        return (head.after - head.before).joint if self.joint else head.after.img - head.before.img


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


@dataclass(slots=True)
class Look:
    """Show the input of the next block after its first norm and modulation, (B, I, C); nothing runs yet.

    Only for methods that list "modulated input" in `MethodConfig.requires`.
    """


class Ran:
    """What a `Run` saw: the stream before and after it, and what the model added between its blocks."""

    def __init__(self, before: Stream) -> None:
        self.before = self.after = before
        self.added: Stream | None = None

    def enter(self, x: Stream) -> None:
        """Notice what the model added since the last block, such as a ControlNet residual."""
        if x.img is self.after.img and x.txt is self.after.txt:
            return
        added = x - self.after
        self.added = added if self.added is None else self.added + added

    @property
    def residual(self) -> Stream:
        """What the blocks alone changed: after - before, less the model's own additions."""
        change = self.after - self.before
        return change if self.added is None else change - self.added

    def replaced(self, kept: list[bool], stand_in: Stream) -> Stream:
        """`after`, except that the samples in `kept` are as if the blocks had been skipped."""
        skipped = self.before + stand_in
        if self.added is not None:
            skipped = skipped + self.added
        return self.after.map(lambda new, old: torch.where(sample_mask(kept, new), old, new), skipped)


Program = Generator[Run | Skip | Look, Ran | Tensor | None, None]


class Call:
    """One forward call of the transformer: carries out a method's program while the model iterates."""

    def __init__(self, engine: Engine, memory: Memory, program: Program, every_index: bool) -> None:
        self.engine, self.memory, self.program = engine, memory, program
        self.every_index = every_index  # the model does something after each block, skipped or not
        self.position = 0  # number of the next block, through the whole model
        self.ran: Ran | None = None
        self.command: Run | Skip | Look | None = next(program)

    def _next_command(self) -> None:
        """Hand the outcome to the program and take its next wish; a wish for no blocks is met at once."""
        while True:
            try:
                self.command = self.program.send(self.ran)
            except StopIteration:
                self.command = None
                return
            if isinstance(self.command, Look) or len(self.command.blocks):
                self.ran = None
                return
            self.ran = self.ran and Ran(self.ran.after)

    @property
    def finished(self) -> bool:
        return self.command is None

    def serve(self, stage: Stage) -> Iterator[Callable]:
        """Yield what the model's own loop over `stage` shall call."""
        for index in range(stage.first, stage.last):
            turn = self.turn(stage, index)
            if turn is not None:
                yield turn
            self.position = index + 1
            if self.position == self.command.blocks.stop:
                self._next_command()

    def turn(self, stage: Stage, index: int) -> Callable | None:
        """What stands in the place of block `index`; None: nothing, the model need not see this index."""
        command = self.command
        if isinstance(command, Look):
            return _Look(self, stage, index)
        if command is None or index not in command.blocks:
            raise RuntimeError(
                f"the model is at block {index}, the method asks for "
                f"{'nothing more' if command is None else command.blocks}: its step must run or skip "
                "every block once, in order"
            )
        last = index == command.blocks.stop - 1
        if isinstance(command, Run):
            self.memory.blocks_run[stage.name] += 1
            return _Tap(self, stage[index - stage.first], command, last)
        if last:
            return _Add(self.engine, command.stand_in)
        return self.engine.pass_through if self.every_index else None

    def look(self, seen: Tensor) -> None:
        """Hand the program what it wished to see."""
        self.command = self.program.send(seen)


class _Tap:
    """Stands before a real block for one call and notes what goes in and out."""

    __slots__ = ("block", "call", "command", "ends")

    def __init__(self, call: Call, block: nn.Module, command: Run, ends: bool) -> None:
        self.call, self.block, self.command, self.ends = call, block, command, ends

    def __call__(self, *args, **kwargs):
        engine, ran = self.call.engine, self.call.ran
        x = engine.read_input(args, kwargs)
        if ran is None:
            ran = self.call.ran = Ran(x)
        else:
            ran.enter(x)
        out = self.block(*args, **kwargs)
        ran.after = engine.read_output(out)
        if self.ends and self.command.kept is not None and any(self.command.kept):
            return engine.write_output(ran.replaced(self.command.kept, self.command.stand_in))
        return out


class _Look:
    """Stands before the first block: shows the method its modulated input, then does what the method says."""

    __slots__ = ("call", "index", "stage")

    def __init__(self, call: Call, stage: Stage, index: int) -> None:
        self.call, self.stage, self.index = call, stage, index

    def __call__(self, *args, **kwargs):
        call, engine = self.call, self.call.engine
        call.look(engine.modulated_input(self.stage[self.index - self.stage.first], args, kwargs))
        turn = call.turn(self.stage, self.index) or engine.pass_through
        return turn(*args, **kwargs)


class _Add:
    """Stands for the last of the skipped blocks: adds the stand-in, out of place."""

    __slots__ = ("engine", "stand_in")

    def __init__(self, engine: Engine, stand_in: Stream) -> None:
        self.engine, self.stand_in = engine, stand_in

    def __call__(self, *args, **kwargs):
        return self.engine.write_output(self.engine.read_input(args, kwargs) + self.stand_in)


class Stage(nn.ModuleList):
    """A model's block list that can be driven: the very same blocks, under the same names.

    Outside a cached forward it is a plain `ModuleList`. It shares the dictionary of blocks with the list it
    stands for, so that a block exchanged while it is in place is exchanged in the original too.
    """

    def __init__(
        self, blocks: nn.ModuleList, name: str, first: int, current_call: Callable[[], Call | None]
    ) -> None:
        super().__init__()
        self._modules = blocks._modules
        self.training = blocks.training
        self.name = name
        self.first, self.last = first, first + len(blocks)
        self._current_call = current_call

    def __iter__(self) -> Iterator[Callable]:
        call = self._current_call()
        if call is None or call.position != self.first:  # not a cached forward, or one that was broken off
            return super().__iter__()
        return call.serve(self)
