"""How a method's step is carried out inside the model's own forward.

The model's forward stays untouched: its block lists are replaced by `DrivenBlocks`, and iterating one of
them inside a cached forward asks the method what to hand out: a real block with a tap on it, or a
pass-through. So whatever the model does between its blocks (ControlNet residuals, for one) still happens, at
every step, fresh.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from torch import Tensor, nn

from h2cache.engines.base import Engine, Inputs
from h2cache.engines.forms import Form
from h2cache.memory import Memory
from h2cache.offload import onload
from h2cache.parallel import STREAM, TEXT, Cut, Group, cut_at, first_block
from h2cache.program import (
    Command,
    Drive,
    Driven,
    Forward,
    Latents,
    Look,
    Output,
    Program,
    Ran,
    Run,
    Skip,
    Stand,
    Stream,
)

_WITH_BLOCKS = Run, Skip, Drive


class Call:
    """One forward call of the transformer: carries out a method's program while the model iterates.

    stage_of: name of the stage of each block. entered: called once, with the stream before the first block
    that runs.
    """

    def __init__(
        self,
        engine: Engine,
        stage_of: tuple[str, ...],
        inputs: Inputs,
        memory: Memory,
        program: Program,
        entered: Callable[[Stream], None] | None = None,
    ) -> None:
        self.engine, self.inputs, self.memory, self.program = engine, inputs, memory, program
        self.text_tokens = inputs.text_tokens
        self._stage_of = stage_of
        self._cut: Cut | None = None  # what is still to divide the stream among processes
        self.position = 0  # number of the next block, through the whole model
        self.entered = entered
        self.ran: Ran | None = None
        self.drove = False  # whether a block's modules have been answered for
        self.driven: tuple[int, Drive] | None = None  # the block whose modules are answered for, right now
        self.command: Command | None = self._of_blocks(next(program))

    def divide(self, transformer: nn.Module, group: Group) -> None:
        """Read the arguments of blocks as they are for one of several processes."""
        if group.divided:
            if cut_at(transformer, TEXT) is not None:
                self.text_tokens = len(group.part(self.text_tokens))
            self._cut = cut_at(first_block(transformer, self.engine), STREAM)

    def own(self, turn: _Turn, args: tuple, kwargs: dict, looks: bool = False) -> tuple[tuple, dict]:
        """A block's arguments as this process will have them: some models divide the stream at the first."""
        if self._cut is None:
            return args, kwargs
        if self.memory.spread is not None:
            whole = turn.blocks.form.read_input(args, kwargs, self.text_tokens)
            self.memory.spread.image = whole.img.shape[1]
        divided = self._cut(turn.block, *args, **kwargs)
        if not looks:
            self._cut = None
        return divided

    def _next_command(self) -> None:
        """Hand the outcome to the program and take its next wish; a wish for no blocks is met at once."""
        while True:
            try:
                self.command = self._of_blocks(self.program.send(self.ran))
            except StopIteration:
                self.command = None
                return
            if not isinstance(self.command, _WITH_BLOCKS) or len(self.command.blocks):
                self.ran = None
                return
            self.ran = self.ran and Ran(self.ran.after, self.memory.targets)

    @property
    def finished(self) -> bool:
        return self.command is None

    def serve(self, blocks: DrivenBlocks) -> Iterator[Callable]:
        """Yield what the model's own loop over `blocks` should call."""
        index, jumps = blocks.first, not self.inputs.adds_between  # it need not see every index
        while index < blocks.last:
            if isinstance(self.command, Look):
                yield _Look(self, blocks, index, self.command)
            else:
                command = self._command_at(index)
                run = command.blocks
                if jumps and isinstance(command, Skip):
                    if run.stop > blocks.last:
                        break
                    index = run.stop - 1
                elif jumps and isinstance(command, Run) and run.start < index:
                    inner = range(index, min(run.stop - 1, blocks.last))  # nobody looks on either side of it
                    if inner:
                        self._count(inner)
                        yield from blocks.between(inner)
                        index = inner.stop
                    if index == blocks.last:
                        break
                yield self._turn(blocks, index, command)
            self.position = index = index + 1
            if isinstance(self.command, _WITH_BLOCKS) and index == self.command.blocks.stop:
                self._next_command()
        self.position = blocks.last

    def turn(self, blocks: DrivenBlocks, index: int) -> Callable:
        """What stands in the place of block `index`."""
        if isinstance(self.command, Look):
            return _Look(self, blocks, index, self.command)
        return self._turn(blocks, index, self._command_at(index))

    def _turn(self, blocks: DrivenBlocks, index: int, command: Run | Skip | Drive) -> Callable:
        """What stands in the place of block `index`, for which `command` is."""
        if isinstance(command, Skip):
            kind = _Add if index == command.blocks.stop - 1 else _Pass
            return kind(self, blocks, index, command)
        if isinstance(command, Run) or command.counts:
            self.memory.blocks_run[self._stage_of[index]] += 1
        return _Tap(self, blocks, index, command)

    def _count(self, blocks: range) -> None:
        """Note that these blocks are computed."""
        for name, count in Counter(self._stage_of[blocks.start : blocks.stop]).items():
            self.memory.blocks_run[name] += count

    def _command_at(self, index: int) -> Run | Skip | Drive:
        """The current command; RuntimeError unless it is for block `index`."""
        command = self.command
        if isinstance(command, _WITH_BLOCKS) and index in command.blocks:
            return command
        raise RuntimeError(
            f"the model is at block {index}, the method asks for "
            f"{'nothing more' if command is None else getattr(command, 'blocks', 'a look')}: its step must "
            "run or skip every block once, in order"
        )

    def begin_run(self, x: Stream) -> Ran:
        """The next `Run` begins, with `x`."""
        if self.entered is not None:
            self.entered(x)
            self.entered = None
        self.ran = Ran(x, self.memory.targets)
        return self.ran

    def drive(self, x: Stream, blocks: Driven) -> Stream:
        """Carry out the whole program where there is no list to iterate; returns the stream at its end."""
        while self.position < len(self._stage_of):
            if isinstance(self.command, Look):
                self.look(blocks.modulated_input(x, self.position))
                continue
            command = self._command_at(self.position)
            added = blocks.added(x, command.blocks)
            if isinstance(command, Run):
                self._count(command.blocks)
                ran = self.begin_run(x)
                ran.added = added
                ran.after = x = blocks.run(x, command.blocks)
                if command.kept is not None and any(command.kept):
                    x = ran.replaced(command.kept, command.stand_in)
            elif isinstance(command, Drive):
                raise RuntimeError("these blocks have no modules that a method could answer for")
            else:
                x = x + command.stand_in
                x = x if added is None else x + added
            self.position = command.blocks.stop
            self._next_command()
        return x

    def run_block(self, blocks: DrivenBlocks, index: int, command: Drive, args: tuple, kwargs: dict) -> Any:
        """Call a block with its modules answered for."""
        self.driven, self.drove = (index, command), True
        try:
            return blocks.block(index)(*args, **kwargs)
        finally:
            self.driven = None

    def output(self, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """What the model's last layer gives, or what the program says instead."""
        if not isinstance(self.command, Output):
            return forward(*args, **kwargs)
        answered = self.command.answer(forward, args, kwargs)
        self._next_command()
        return answered

    def look(self, seen: Tensor) -> None:
        """Hand the program what it wished to see, of the image tokens that are drawn."""
        if (targets := self.memory.targets) is not None:
            seen = seen[:, targets].clone()  # who keeps it must not keep the others with it
        self.command = self._of_blocks(self.program.send(seen))

    def _of_blocks(self, wish: Command | Latents | Forward | Stand) -> Command:
        """A method's wish about blocks; RuntimeError for what only a method without stages may ask."""
        while isinstance(wish, Latents):
            wish = self.program.send(self.inputs.drawn(self.memory.targets))
        if isinstance(wish, (Forward, Stand)):
            raise RuntimeError(f"{type(wish).__name__} is for methods that require 'whole' of a model")
        return wish


class _Turn:
    """Stands in the place of a block for one call; what it has not itself is the block's."""

    def __init__(self, call: Call, blocks: DrivenBlocks, index: int, command: Any) -> None:
        self.call, self.blocks, self.index, self.command = call, blocks, index, command

    @property
    def block(self) -> nn.Module:
        return self.blocks.block(self.index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)  # SD3's forward reads an attribute of each block


class _Tap(_Turn):
    """Runs the block and notes what goes in and out; its command is a `Run` or `Drive`."""

    def __call__(self, *args, **kwargs):
        call, form, command, block = self.call, self.blocks.form, self.command, self.block
        ran, looks = call.ran, call.inputs.adds_between  # at what the model adds between two blocks
        if ran is None or looks:
            x = form.read_input(*call.own(self, args, kwargs), call.text_tokens)
            if ran is None:
                ran = call.begin_run(x)
            else:
                ran.enter(x)
        if self.index == command.blocks.start:
            onload(block, unless_leader=True)
        if isinstance(command, Drive):
            out = call.run_block(self.blocks, self.index, command, args, kwargs)
            ran.after = form.read_output(out, call.text_tokens)
            return out
        out, ends = block(*args, **kwargs), self.index == command.blocks.stop - 1
        if ends or looks:
            ran.after = form.read_output(out, call.text_tokens)
        if ends and command.kept is not None and any(command.kept):
            return form.write_output(ran.replaced(command.kept, command.stand_in))
        return out


class _Look(_Turn):
    """Shows the method the modulated input of a block, then does what the method says."""

    def __call__(self, *args, **kwargs):
        call = self.call
        onload(self.block)
        call.look(call.engine.modulated_input(self.block, *call.own(self, args, kwargs, looks=True)))
        return call.turn(self.blocks, self.index)(*args, **kwargs)


class _Add(_Turn):
    """Stands for the last of the skipped blocks: adds the `Skip`'s stand-in, out of place."""

    def __call__(self, *args, **kwargs):
        form, call = self.blocks.form, self.call
        x = form.read_input(*call.own(self, args, kwargs), call.text_tokens)
        return form.write_output(x + self.command.stand_in)


class _Pass(_Turn):
    """Stands for a skipped block whose index the model must see."""

    def __call__(self, *args, **kwargs):
        args, kwargs = self.call.own(self, args, kwargs)
        return self.blocks.form.pass_through(*args, **kwargs)


class DrivenBlocks(nn.ModuleList):
    """A model's block list that can be driven: the very same blocks, under the same names.

    Outside a cached forward it is a plain `ModuleList`. It shares the dictionary of blocks with the list it
    stands for, so that a block exchanged while it is in place is exchanged in the original too.
    """

    def __init__(
        self, blocks: nn.ModuleList, form: Form, first: int, current_call: Callable[[], Call | None]
    ) -> None:
        super().__init__()
        self._modules = blocks._modules
        self.training = blocks.training
        self.form = form
        self.first, self.last = first, first + len(blocks)
        self._current_call = current_call

    def block(self, index: int) -> nn.Module:
        """The block of this number through the whole model."""
        return self._modules[str(index - self.first)]

    def between(self, indices: range) -> Iterator[nn.Module]:
        """The blocks of these numbers."""
        return islice(self._modules.values(), indices.start - self.first, indices.stop - self.first)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):  # a part is a plain list; group offloading asks for it
            return nn.ModuleList(list(self._modules.values())[index])
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Any]:
        call = self._current_call()
        if call is None or call.position != self.first:  # not a cached forward, or one that was broken off
            return super().__iter__()
        return call.serve(self)


def take_over(
    engine: Engine, transformer: nn.Module, firsts: dict[str, int], current_call: Callable[[], Call | None]
) -> Callable[[nn.Module], None]:
    """Let `current_call()` drive the blocks of `transformer` from now on; returns what undoes it.

    firsts: number of the first block of each list.
    """
    undo = engine.take_over(transformer, firsts, current_call)
    if undo is not None:
        return undo
    lists, forms = {}, {cut.blocks: cut.form for cut in engine.cuts}
    for attribute, first in firsts.items():
        blocks = lists[attribute] = getattr(transformer, attribute)
        setattr(transformer, attribute, DrivenBlocks(blocks, forms[attribute], first, current_call))

    def put_back(transformer: nn.Module) -> None:
        for attribute, blocks in lists.items():
            setattr(transformer, attribute, blocks)

    return put_back
