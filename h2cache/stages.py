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
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from h2cache.offload import onload
from h2cache.similarity import sample_mask

if TYPE_CHECKING:
    from h2cache.engines import Engine, Inputs
    from h2cache.engines.forms import Form
    from h2cache.memory import Memory


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
        changes_text = self.txt is not None and change.txt is not None
        return Stream(self.img + change.img, self.txt + change.txt if changes_text else self.txt)

    def __sub__(self, other: Stream) -> Stream:
        both = self.txt is not None and other.txt is not None
        return Stream(self.img - other.img, self.txt - other.txt if both else None)

    def is_at(self, other: Stream) -> bool:
        """Whether both are the same memory, if perhaps cut anew out of a joined tensor."""
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
class Span:
    """A stage as a method sees it: its name and its blocks, numbered through the whole model.

    Spans need not agree with the model's block lists: a span may be a part of one, or reach over two.
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

    remember: keep the block calls of this step, so that a later `Drive` can ask for them again. again: asked
    after the last block; if it gives an `answer`, all remembered blocks run anew with it, and that is the
    outcome.
    """

    blocks: range
    answer: Answer
    counts: bool
    remember: bool = False
    again: Callable[[], Answer | None] | None = None


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

    def replaced(self, kept: list[bool], stand_in: Stream) -> Stream:
        """`after`, except that the samples in `kept` are as if the blocks had been skipped."""
        skipped = self.before + stand_in
        if self.added is not None:
            skipped = skipped + self.added
        return self.after.map(lambda new, old: torch.where(sample_mask(kept, new), old, new), skipped)


Program = Generator[Run | Skip | Look | Drive | Output, Ran | Tensor | None, None]
_RUNS, _NO_BLOCKS = (Run, Drive), (Look, Output)


class Driven(Protocol):
    """Blocks that only a call can reach: what an engine without block lists hands to `Call.drive`."""

    def run(self, x: Stream, blocks: range) -> Stream:
        """Execute `blocks`, in one call where the model has one."""

    def added(self, x: Stream, blocks: range) -> Stream | None:
        """What the model itself adds to `x` after `blocks`, executed or not (ControlNet); None: nothing."""

    def modulated_input(self, x: Stream, block: int) -> Tensor:
        """The image tokens (B, I, C) of `x` after the first norm and modulation of `block`."""


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
        self.position = 0  # number of the next block, through the whole model
        self.entered = entered
        self.ran: Ran | None = None
        self.driven: tuple[int, Drive] | None = None  # the block whose modules are answered for, right now
        self.remembered: list[tuple] = []  # block calls: stage, index, args, kwargs, input and output stream
        self.command: Run | Skip | Look | Drive | Output | None = next(program)

    def _next_command(self) -> None:
        """Hand the outcome to the program and take its next wish; a wish for no blocks is met at once."""
        while True:
            try:
                self.command = self.program.send(self.ran)
            except StopIteration:
                self.command = None
                return
            if isinstance(self.command, _NO_BLOCKS) or len(self.command.blocks):
                self.ran = None
                return
            self.ran = self.ran and Ran(self.ran.after, self.memory.targets)

    @property
    def finished(self) -> bool:
        return self.command is None

    def serve(self, stage: Stage) -> Iterator[Callable]:
        """Yield what the model's own loop over `stage` shall call."""
        index = stage.first
        while index < stage.last:
            if isinstance(self.command, Skip) and not self.inputs.adds_between:
                stop = self._command_at(index).blocks.stop
                if stop > stage.last:
                    break
                index = stop - 1  # the model need not see those before
            yield self.turn(stage, index)
            index += 1
            self.position = index
            if index == self.command.blocks.stop:
                self._next_command()
        self.position = stage.last

    def turn(self, stage: Stage, index: int) -> Callable:
        """What stands in the place of block `index`."""
        if isinstance(self.command, Look):
            return _Look(self, stage, index)
        command = self._command_at(index)
        last = index == command.blocks.stop - 1
        if isinstance(command, _RUNS):
            self.memory.blocks_run[self._stage_of[index]] += isinstance(command, Run) or command.counts
            return _Tap(self, stage, index, command, last)
        if last:
            return _Add(self, stage, index, command.stand_in)
        return _Pass(self, stage, index)

    def _command_at(self, index: int) -> Run | Skip:
        """The current command; RuntimeError unless it is for block `index`."""
        command = self.command
        if command is None or index not in command.blocks:
            raise RuntimeError(
                f"the model is at block {index}, the method asks for "
                f"{'nothing more' if command is None else command.blocks}: its step must run or skip "
                "every block once, in order"
            )
        return command

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
                for index in command.blocks:
                    self.memory.blocks_run[self._stage_of[index]] += 1
                self.begin_run(x).added = added
                self.ran.after = x = blocks.run(x, command.blocks)
                if command.kept is not None and any(command.kept):
                    x = self.ran.replaced(command.kept, command.stand_in)
            else:
                x = x + command.stand_in
                x = x if added is None else x + added
            self.position = command.blocks.stop
            self._next_command()
        return x

    def run_block(self, stage: Stage, index: int, command: Drive, args: tuple, kwargs: dict) -> Any:
        """Call a block with its modules answered for."""
        self.driven = (index, command)
        try:
            return stage.block(index)(*args, **kwargs)
        finally:
            self.driven = None

    def run_again(self, answer: Answer) -> Any:
        """Run all remembered blocks anew, from the same input and with what the model added between them."""
        stream = self.remembered[0][4]
        before = out = None
        for stage, index, args, kwargs, x, after in self.remembered:
            if before is not None:
                stream = stage.form.read_output(out, self.text_tokens)
                if not x.is_at(before):
                    stream = stream + (x - before)
            before = after
            self.memory.blocks_run[self._stage_of[index]] += 1
            args, kwargs = self.engine.with_input(args, kwargs, stream)
            out = self.run_block(stage, index, Drive(range(index, index + 1), answer, True), args, kwargs)
        self.remembered.clear()
        return out

    def output(self, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """What the model's last layer gives, or what the program says instead."""
        if not isinstance(self.command, Output):
            return forward(*args, **kwargs)
        answered = self.command.answer(forward, args, kwargs)
        self._next_command()
        return answered

    def look(self, seen: Tensor) -> None:
        """Hand the program what it wished to see, of the image tokens that are drawn."""
        targets = self.memory.targets
        self.command = self.program.send(seen if targets is None else seen[:, targets])


class _Turn:
    """Stands in the place of a block for one call; what it has not itself is the block's."""

    def __init__(self, call: Call, stage: Stage, index: int) -> None:
        self.call, self.stage, self.index = call, stage, index

    @property
    def block(self) -> nn.Module:
        return self.stage.block(self.index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)  # SD3's forward reads an attribute of each block


class _Tap(_Turn):
    """Runs the block and notes what goes in and out."""

    def __init__(self, call: Call, stage: Stage, index: int, command: Run | Drive, ends: bool) -> None:
        super().__init__(call, stage, index)
        self.command, self.ends = command, ends

    def __call__(self, *args, **kwargs):
        call, form = self.call, self.stage.form
        ran, x = call.ran, form.read_input(args, kwargs, call.text_tokens)
        if ran is None:
            ran = call.begin_run(x)
        elif call.inputs.adds_between or not (form.joined and self.index == self.stage.first):
            ran.enter(x)
        block = self.block
        if self.index == self.command.blocks.start:
            onload(block, unless_leader=True)
        if isinstance(self.command, Drive):
            return self._run_driven(x, args, kwargs)
        out = block(*args, **kwargs)
        ran.after = form.read_output(out, call.text_tokens)
        if self.ends and self.command.kept is not None and any(self.command.kept):
            return form.write_output(ran.replaced(self.command.kept, self.command.stand_in))
        return out

    def _run_driven(self, x: Stream, args: tuple, kwargs: dict) -> Any:
        call, command, form = self.call, self.command, self.stage.form
        out = call.run_block(self.stage, self.index, command, args, kwargs)
        if command.remember:
            after = form.read_output(out, call.text_tokens)
            call.remembered.append((self.stage, self.index, args, kwargs, x, after))
        if self.ends and command.again is not None:
            answer = command.again()
            if answer is not None:
                out = call.run_again(answer)
        call.ran.after = form.read_output(out, call.text_tokens)
        return out


class _Look(_Turn):
    """Shows the method the modulated input of a block, then does what the method says."""

    def __call__(self, *args, **kwargs):
        call = self.call
        onload(self.block)
        call.look(call.engine.modulated_input(self.block, args, kwargs))
        return call.turn(self.stage, self.index)(*args, **kwargs)


class _Add(_Turn):
    """Stands for the last of the skipped blocks: adds the stand-in, out of place."""

    def __init__(self, call: Call, stage: Stage, index: int, stand_in: Stream) -> None:
        super().__init__(call, stage, index)
        self.stand_in = stand_in

    def __call__(self, *args, **kwargs):
        form = self.stage.form
        return form.write_output(form.read_input(args, kwargs, self.call.text_tokens) + self.stand_in)


class _Pass(_Turn):
    """Stands for a skipped block whose index the model must see."""

    def __call__(self, *args, **kwargs):
        return self.stage.form.pass_through(*args, **kwargs)


class Stage(nn.ModuleList):
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

    def __getitem__(self, index: int | slice) -> nn.Module:
        if isinstance(index, slice):  # a part is a plain list; group offloading asks for it
            return nn.ModuleList(list(self._modules.values())[index])
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Callable]:
        call = self._current_call()
        if call is None or call.position != self.first:  # not a cached forward, or one that was broken off
            return super().__iter__()
        return call.serve(self)
