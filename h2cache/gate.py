"""Where, at its coarsest: before the call of the whole denoiser. A skipped step runs nothing of it.

The gate takes the place that PyTorch keeps for a compiled call of a module, before all of its hooks. So it
stands outside of what accelerate and diffusers hook into a model, and outside of a compiled graph; weights
that are offloaded stay where they are on a skipped step.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from h2cache.attachment import Attachment, refuse_other_caches
from h2cache.memory import Memory
from h2cache.program import Forward, Stand
from h2cache.room import free_bytes, require_bytes

_COMPILE_FIRST = (
    "the plan of h2cache stands before this model, and its decisions must not be traced: compile first and "
    "call h2cache.enable then, or compile in place, with model.compile()"
)
_CALL = "_compiled_call_impl"  # looked at by `nn.Module.__call__` before hooks and forward
_HAS_REASON = "reason" in signature(torch.compiler.disable).parameters  # not in torch 2.7
_TOLD = {"reason": _COMPILE_FIRST} if _HAS_REASON else {}


class Gate(Attachment):
    """A method that answers for a whole denoiser."""

    def attach(self) -> None:
        denoiser = self._denoiser()
        model: nn.Module = getattr(denoiser, "_orig_mod", denoiser)  # wrapped by torch.compile
        lists = {cut.blocks: cut for cut in self.engine.cuts}.values()
        self._blocks = sum(self.engine.count(model, cut) for cut in lists) or 1  # unknown: the whole is one
        self._own: Callable | None = vars(denoiser).get(_CALL)  # compiled in place

        def gate(*args: Any, **kwargs: Any) -> Any:  # a function: torch 2.7 cannot mark a bound method
            return self._call(*args, **kwargs)

        self._gate = torch.compiler.disable(gate, recursive=False, **_TOLD)
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

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        denoiser = self._denoiser()
        self.check_call()
        try:
            memory = self.requests.memory(self.engine.inputs(args, kwargs))
            memory.blocks = self._blocks
            program = self.method.step((), memory)
            command = next(program)
            if isinstance(command, Stand):
                output, answer = memory.state("form", Form).made_of(command.tensors), None
            else:
                assert isinstance(command, Forward)
                output = (self._own or denoiser._call_impl)(*args, **kwargs)
                answer = memory.state("form", Form).read(output)
                if memory.bytes_needed is None:
                    self._reserve(memory, answer)
            program.send(answer)
        except StopIteration:
            memory.end_step(grew=answer is not None)
            return output
        except BaseException:
            self.requests.forget("the call before was broken off")
            raise
        raise RuntimeError(f"{self.config.name} asks for more than one output of one call")

    def _reserve(self, memory: Memory, output: list[torch.Tensor]) -> None:
        """Once a branch: whether its outputs can be kept."""
        refuse_other_caches(self._denoiser())  # something may have come since
        needed = self.config.outputs_held * sum(part.nbytes for part in output)
        memory.bytes_needed = require_bytes(self.config, needed, free_bytes(output[0].device))


class Form:
    """How a model gives its output: its own class, a tuple, and what in it is not forecast."""

    def __init__(self) -> None:
        self.spec: Any = None
        self.others: list[Any] = []  # aligned with the leaves; None: forecast

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
