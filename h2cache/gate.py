"""Where, at its coarsest: before the call of the whole denoiser. A skipped step runs nothing of it.

The gate takes the place that PyTorch keeps for a compiled call of a module, before all of its hooks. So it
stands outside of what accelerate and diffusers hook into a model, and outside of a compiled graph; weights
that are offloaded stay where they are on a skipped step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from h2cache.attachment import Attachment, reason, refuse_other_caches, wrapper_of
from h2cache.memory import Memory
from h2cache.program import Latents, Program, Stand
from h2cache.room import free_bytes, require_bytes

_COMPILE_FIRST = (
    "the plan of h2cache stands before this model, and its decisions must not be traced: compile first and "
    "call h2cache.enable then, or compile in place, with model.compile()"
)
_CALL = "_compiled_call_impl"  # looked at by `nn.Module.__call__` before hooks and forward


class Gate(Attachment):
    """A method that answers for a whole denoiser."""

    def attach(self) -> None:
        denoiser = self._denoiser()
        model: nn.Module = getattr(denoiser, "_orig_mod", denoiser)  # wrapped by torch.compile
        lists = {cut.blocks: cut for cut in self.engine.cuts}.values()
        self._blocks = sum(self.engine.count(model, cut) for cut in lists) or 1  # unknown: the whole is one
        self._own: Callable | None = vars(denoiser).get(_CALL)  # compiled in place

        def gate(*args: Any, **kwargs: Any) -> Any:  # a function: torch 2.7 cannot mark a bound method
            """Stands for the denoiser's call. It is not compiled; what it calls, the model, may be."""
            try:
                step = self._before(args, kwargs)
                if not step.answered:
                    step.output = (self._own or self._denoiser()._call_impl)(*args, **kwargs)
                    self._after(step)
            except BaseException:
                self.requests.forget("the call before was broken off")
                raise
            return step.output

        self._gate = torch.compiler.disable(gate, recursive=False, **reason(_COMPILE_FIRST))
        self._place(_CALL, self._gate)
        self._place("compile", self._compile_inside)
        self._name_branches()

    def detach(self) -> None:
        self._take_away()

    def behind(self, call: Callable | None) -> Callable | None:
        return self._own if call is self._gate else call

    def _compile_inside(self, *args: Any, **kwargs: Any) -> None:
        """`Module.compile`, with the gate kept before what it compiles."""
        denoiser = self._denoiser()
        vars(denoiser)[_CALL] = None
        type(denoiser).compile(denoiser, *args, **kwargs)
        self._own = vars(denoiser)[_CALL]
        self._placed[_CALL] = self._gate, self._own
        vars(denoiser)[_CALL] = self._gate

    @torch.compiler.disable
    def _before(self, args: tuple, kwargs: dict[str, Any]) -> _Step:
        """Ask the method: it answers, or wants the model to run."""
        self.check_call()
        inputs = self.engine.inputs(args, kwargs)
        memory = self.requests.memory(inputs)
        if memory.bytes_needed is None:  # something may have come since
            refuse_other_caches(self._denoiser())
            if _is_in_one_graph(self._denoiser()):
                raise ValueError(_COMPILE_FIRST)
        memory.blocks = self._blocks
        step = _Step(memory, self.method.step((), memory))
        command = next(step.program)
        while isinstance(command, Latents):
            latents = inputs.drawn(memory.targets)
            step.latents = latents.nbytes
            command = step.program.send(latents)
        if isinstance(command, Stand):
            step.answered, step.output = True, memory.state("form", Form).made_of(command.tensors)
            self._end(step, None)
        return step

    @torch.compiler.disable
    def _after(self, step: _Step) -> None:
        """Let the method learn what the model gave."""
        answer = step.memory.state("form", Form).read(step.output)
        if step.memory.bytes_needed is None:
            self._reserve(step, answer)
        self._end(step, answer)

    def _end(self, step: _Step, answer: list[torch.Tensor] | None) -> None:
        try:
            command = step.program.send(answer)
            if answer is not None and isinstance(command, Stand):  # for some samples of the batch
                step.output = step.memory.state("form", Form).made_of(command.tensors)
                step.program.send(None)
        except StopIteration:
            step.memory.end_step(grew=answer is not None or self.config.latents_held > 0)
        else:
            raise RuntimeError(f"{self.config.name} asks for more than one output of one call")

    def _reserve(self, step: _Step, output: list[torch.Tensor]) -> None:
        """Once a branch: whether what the method keeps of inputs and outputs has room."""
        needed = self.config.outputs_held * sum(part.nbytes for part in output)
        needed += self.config.latents_held * step.latents
        step.memory.bytes_needed = require_bytes(self.config, needed, free_bytes(output[0].device))


def _is_in_one_graph(denoiser: nn.Module) -> bool:
    """Whether `denoiser` is called by a wrapper of torch.compile that wants a single graph of all of it."""
    wrapper = wrapper_of(denoiser)
    return wrapper is not None and bool(getattr(wrapper.dynamo_ctx, "fullgraph", False))


@dataclass(slots=True)
class _Step:
    """One call of the denoiser."""

    memory: Memory
    program: Program
    latents: int = 0  # bytes of what the method has seen of them
    answered: bool = False  # by the method: nothing of the model runs
    output: Any = None


class Form:
    """How a model gives its output: its own class, a tuple, and what in it is not forecast."""

    def __init__(self) -> None:
        self.spec: Any = None
        self.others: list[Any] = []  # aligned with the leaves; None: forecast
        self.outputs_kept = ()  # what is not forecast is the pipeline's own (Klein's keys and values)

    def read(self, output: Any) -> list[torch.Tensor]:
        """The tensors of `output`."""
        leaves, self.spec = pytree.tree_flatten(output)
        self.others = [None if _is_signal(leaf) else (leaf,) for leaf in leaves]
        return [leaf for leaf in leaves if _is_signal(leaf)]

    def made_of(self, tensors: list[torch.Tensor]) -> Any:
        """An output of the same form with other tensors."""
        given = iter(tensors)
        leaves = [next(given) if other is None else other[0] for other in self.others]
        return pytree.tree_unflatten(leaves, self.spec)


def _is_signal(leaf: Any) -> bool:
    """Whether this is something to be forecast."""
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
