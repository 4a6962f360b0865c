"""A method's decisions about FLUX's blocks, inside the model's own forward as ComfyUI has it.

ComfyUI's own way to exchange a part of a model, an object patch, puts a list of seats in the place of each
block list: each seat calls its block, or leaves it out. Seats stay the same objects, and nothing begins
before the first of them is called, for newer models go over a list once before their loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from h2cache.comfyui.engine import DoubleBlocks, SingleBlocks, clamped
from h2cache.drive import DrivenBlocks
from h2cache.memory import Memory
from h2cache.program import Program, Ran, Run, Skip, Stream


class Current(threading.local):
    """The call of the model that is under way, of each thread; None: one without a cache."""

    walk: Walk | None = None


class Seats(DrivenBlocks):
    """A block list whose every place can be passed by: the same blocks, under the same names."""

    form: DoubleBlocks | SingleBlocks

    def __init__(self, blocks: nn.ModuleList, form: Any, first: int, current: Current) -> None:
        super().__init__(blocks, form, first, lambda: None)
        self.current = current
        self._seats = [_Seat(self, index) for index in range(self.first, self.last)]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._seats)


class _Seat:
    """A block's place; what it has not itself is the block's."""

    def __init__(self, blocks: Seats, index: int) -> None:
        self._blocks, self._index = blocks, index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block, walk = self._blocks.block(self._index), self._blocks.current.walk
        if walk is None:
            return block(*args, **kwargs)
        return walk.serve(block, self._index, self._blocks.form, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._blocks.block(self._index), name)


class Walk:
    """One call of the model: carries out a method's program as the model goes from block to block.

    stage_of: name of the stage of each block. adds_between: whether the model or a patch may add something
    after a block. entered: called once, with the stream before the first block.
    """

    def __init__(
        self,
        program: Program,
        memory: Memory,
        stage_of: tuple[str, ...],
        adds_between: bool,
        entered: Callable[[Stream], None] | None,
    ) -> None:
        self._program, self._memory = program, memory
        self._stage_of, self._adds_between, self._entered = stage_of, adds_between, entered
        self._text_tokens = 0
        self._ran: Ran | None = None
        self._newest: Stream | None = None  # before the newest block
        self._stood_in = False  # whether the stand-in of a `Skip` has been added
        self.position = 0  # number of the next block, through the whole model
        self._command: Any = next(program)

    def serve(
        self,
        block: Callable,
        index: int,
        form: DoubleBlocks | SingleBlocks,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Any:
        """What block `index` returns, or stands for it."""
        x = self._newest = form.read_input(args, kwargs, self._text_tokens)
        if x.txt is not None and not form.joined:
            self._text_tokens = x.txt.shape[1]
        if self._entered is not None:
            self._entered(x)
            self._entered = None
        while self.position < index:  # blocks whose place a patch has taken, and that it has not called
            self._pass(x)
        command = self._command
        if isinstance(command, Skip):
            out = form.pass_through(*args, **kwargs)
            if not self._stood_in:  # once, at the first that is called: a patch may leave out any
                self._stood_in = True
                out = form.write_output((x + command.stand_in).map(clamped))
            self._pass(x)
            return out
        if not isinstance(command, Run):
            raise RuntimeError(f"the model is at block {index}, the method asks for {command}")
        self._memory.blocks_run[self._stage_of[index]] += 1
        if self._ran is None:
            self._ran = Ran(x, self._memory.targets)
            args, kwargs = form.copied(args, kwargs)  # blocks write into their inputs
        elif self._adds_between:
            self._ran.enter(x)
        out = block(*args, **kwargs)
        self._ran.after = form.read_output(out, self._text_tokens)
        last = index + 1 == command.blocks.stop
        if last and command.kept is not None and any(command.kept):
            out = form.write_output(self._ran.replaced(command.kept, command.stand_in).map(clamped))
        elif not last and self._adds_between:  # the model adds in place
            self._ran.after = self._ran.after.map(lambda part: part.clone())
        self._pass(x)
        return out

    def finish(self) -> None:
        """The model has returned; what a patch has left out at its end changed nothing."""
        while self.position < len(self._stage_of) and self._newest is not None:
            self._pass(self._newest)
        if self._command is not None:
            raise RuntimeError(
                "the blocks of this model were not called one after the other: another node has replaced its "
                "block lists or its forward. Use H2-Cache Plan, which stands before the whole model"
            )

    def _pass(self, x: Stream) -> None:
        """The next block is done; at the end of a command hand over what it saw and take the next."""
        if self._ran is None and isinstance(self._command, Run):
            self._ran = Ran(x, self._memory.targets)  # a patch has taken the place of its first block
        self.position += 1
        while self._command is not None and self.position >= self._command.blocks.stop:
            try:
                self._command, before = self._program.send(self._ran), self._ran
            except StopIteration:
                self._command = None
                return
            empty = isinstance(self._command, Run) and not len(self._command.blocks)
            self._ran = Ran(before.after, self._memory.targets) if empty and before else None
            self._stood_in = False
