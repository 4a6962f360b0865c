"""Whose state a forward call belongs to: which request, which guidance branch, which step.

A request is one pipeline call. Nothing outlives it: a new call, a step that does not come after the last one,
or inputs of another shape, dtype, device, batch or prompt begin a new one, and so does anything that leaves a
doubt. Each thread has a request of its own. Where a pipeline runs the model, its scheduler says which step is
at hand; in a loop of the user's own the timesteps must fall.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from h2cache.engines.base import Inputs
from h2cache.memory import Memory, Request
from h2cache.parallel import Group, Tokens
from h2cache.schedule import Schedule, calling_pipeline, local_of, was_edited

MOST_BRANCHES = 4  # calls at one step that a pipeline may make without naming them


class _Thread(threading.local):
    """What belongs to one thread."""

    request: Request | None = None
    branch: str | None = None  # as the pipeline names it
    calls: tuple[Any, dict[str | None, int]] = (None, {})  # the step at hand, and its calls of each name
    reason: str | None = None  # why the next call begins a new request


class Requests:
    """The requests of one denoiser, a current one in each thread.

    pipeline: gives the one that was enabled, or None. steps: of a request, as the caller said. starts: the
    first steps of the pipeline's denoisers, see `Engine.starts`. began: called when a request begins, to free
    what others keep.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        pipeline: Callable[[], Any],
        steps: int | None,
        starts: Callable[[Any, int, int], tuple[int, ...]],
        began: Callable[[Any], None],
    ) -> None:
        self._denoiser = weakref.ref(denoiser)
        self._pipeline, self._steps = pipeline, steps
        self._starts, self._began = starts, began
        self._local = _Thread()
        self._newest = Request(None, None, "nothing has run yet")
        self._all: weakref.WeakSet[Request] = weakref.WeakSet()

    @property
    def current(self) -> Request | None:
        """This thread's request."""
        return self._local.request

    @property
    def newest(self) -> Request:
        """This thread's request, else the one that any thread began last."""
        return self._local.request or self._newest

    @property
    def bytes_held(self) -> int:
        """Bytes that are kept now, by the requests of all threads."""
        return sum(request.bytes_held for request in list(self._all))

    def forget(self, reason: str) -> None:
        """The next call of this thread begins a new request."""
        if self._local.request is not None:
            self._local.request.release()
        self._local.request, self._local.reason = None, reason

    def restart(self) -> None:
        """The next step of this thread's request is computed, from an empty history."""
        if self._local.request is not None:
            self._local.request.restarts += 1

    def name_branch(self, name: str | None) -> str | None:
        """From now on calls of this thread belong to the guidance branch `name`; returns that of before."""
        before, self._local.branch = self._local.branch, name
        return before

    def memory(self, inputs: Inputs) -> Memory:
        """The memory of the branch that a call with `inputs` belongs to; new if in doubt."""
        denoiser = self._denoiser()
        caller = None if denoiser is None else calling_pipeline(denoiser)
        pipeline = caller if caller is not None else self._pipeline()
        schedule = Schedule.of(pipeline)
        if schedule is not None:
            memory = self._in_schedule(inputs, pipeline, schedule, counted=caller is not None)
            if memory is not None:
                return memory
        return self._in_own_loop(inputs)

    def _in_schedule(self, inputs: Inputs, pipeline: Any, schedule: Schedule, counted: bool) -> Memory | None:
        """Where a scheduler says which step this is; None if it does not know the timestep."""
        local, request, reason = self._local, self._local.request, None
        if request is not None and (request.schedule is None or request.schedule.token is not schedule.token):
            request, reason = None, "the pipeline was called again"
        if request is not None and request.schedule is not None:
            schedule = request.schedule
        last = None if request is None else request.position
        position = schedule.position(inputs.timestep, last, counted)
        if position is None:
            return None
        if last is not None and position < last:
            request, reason = None, "the steps began again"
        branch = self._branch(position, new=request is None)
        if branch is None:
            request, reason = None, f"step {position} came again and again"
            branch = self._first_branch(position)
        if request is None:
            request = self._new_request(pipeline, schedule, position, counted)
            request.reason = reason or local.reason or "it is the first"
            self._begin(request)
            self._began(pipeline)
        request.position = position
        changed = self._changed(request, branch, inputs)
        if changed:
            request.reason = f"another {changed} came in"
            request.memories.pop(branch).release()
        memory = self._memory_of(request, branch, inputs, pipeline if counted else None)
        if counted and position != request.edited and was_edited(pipeline):
            request.edited = position
        conditions = (*inputs.conditions, request.restarts, request.edited)
        if request.controls:
            conditions = (*conditions, request.controls[position - request.begun])
        memory.begin_known_step(position - request.first, conditions)
        return memory

    def _new_request(self, pipeline: Any, schedule: Schedule, position: int, counted: bool) -> Request:
        """A request whose first call is at `position` of its schedule."""
        second = getattr(pipeline, "transformer_2", None) is self._denoiser()
        begun = getattr(schedule.scheduler, "begin_index", None) if counted else None
        begun = (0 if second else position) if begun is None else min(begun, position)
        said = getattr(pipeline, "num_timesteps", None) if counted else None
        steps = len(schedule) - begun if not said else min(said, len(schedule) - begun)
        starts = self._starts(pipeline, steps, begun)
        own = 1 if second and len(starts) > 1 else 0
        ends = [*starts[1:], steps]
        request = Request(schedule, ends[own] - starts[own], "")
        request.begun, request.first = begun, begun + starts[own]
        # ControlNets that are switched on or off in mid-run go on giving samples, of zeros.
        keep = local_of(pipeline, "controlnet_keep") if counted else None
        request.controls = tuple(map(str, keep)) if keep and len(keep) == steps else ()
        switches = [n for n, (a, b) in enumerate(pairwise(request.controls), 1) if a != b]
        request.course = schedule.course(begun, steps, tuple(sorted({*starts, *switches})))
        return request

    def _in_own_loop(self, inputs: Inputs) -> Memory:
        """Where nothing but the timestep is known."""
        local, request, reason = self._local, self._local.request, None
        if request is not None and request.schedule is not None:
            request, reason = None, "another loop began"
        timestep: Tensor | float = inputs.timestep
        branch = local.branch
        if branch is None:
            timestep = float(inputs.timestep.reshape(-1)[0])  # a wait, where branches have no names
            branch = self._branch(timestep, new=request is None)
            if branch is None:
                request, reason = None, "the same timestep came again and again"
                branch = self._first_branch(timestep)
            elif request is not None and branch != "call 0" and self._returns(request, branch, inputs):
                request, reason = None, "the timestep did not fall"
                branch = self._first_branch(timestep)
        if request is not None and (changed := self._changed(request, branch, inputs)):
            request, reason = None, f"another {changed} came in"
        if request is None:
            request = self._begin(Request(None, self._steps, reason or local.reason or "it is the first"))
            self._began(self._pipeline())
        memory = self._memory_of(request, branch, inputs)
        memory.begin_step(timestep, (*inputs.conditions, request.restarts))
        return memory

    def _branch(self, here: Any, new: bool) -> str | None:
        """The branch of the call at `here`: its name, or its number; None if there are too many."""
        name = self._local.branch
        step, calls = self._local.calls
        if new or step != here:
            calls = {}
        count = calls[name] = calls.get(name, -1) + 1
        self._local.calls = (here, calls)
        if count >= MOST_BRANCHES:
            return None
        if name is None:
            return f"call {count}"
        return name if count == 0 else f"{name} {count}"

    def _first_branch(self, here: Any) -> str:
        """The branch of the first call of a request."""
        branch = self._branch(here, new=True)
        assert branch is not None
        return branch

    def _returns(self, request: Request, branch: str, inputs: Inputs) -> bool:
        """Whether a further call at one timestep is an earlier one of them again, with other latents.

        That is Heun's second look, or a new start. Guidance gives each branch the same latents and a text of
        its own.
        """
        text, earlier = _text(inputs), (f"call {n}" for n in range(int(branch.removeprefix("call "))))
        same = [name for name in earlier if request.signatures[name][-1] == text]
        return any(not _equal(request.latents[name], inputs.latents) for name in same)

    def _begin(self, request: Request) -> Request:
        if self._local.request is not None:
            self._local.request.release()
        self._local.request = self._newest = request
        self._local.reason = None
        self._all.add(request)
        return request

    def _changed(self, request: Request, branch: str, inputs: Inputs) -> str | None:
        """What of the inputs is another than at the step before; None: nothing."""
        signature = _signature(inputs)
        known = request.signatures.get(branch, signature)
        if known == signature:
            return None
        return next(what for what, a, b in zip(_SIGNED, known, signature, strict=True) if a != b)

    def _memory_of(self, request: Request, branch: str, inputs: Inputs, caller: Any = None) -> Memory:
        if branch not in request.memories:
            # Two prompts of one seed look like [cond, uncond]: the pipeline knows whether it guides.
            guides = getattr(caller, "do_classifier_free_guidance", None) is not False
            denoiser = self._denoiser()
            group = None if denoiser is None else Group.of(denoiser)
            batch, guided, drawn = inputs.latents.shape[0], guides and inputs.guided(), inputs.targets()
            memory = request.memories[branch] = Memory(request, branch, batch, drawn, guided, group)
            if group is not None and group.divided:  # image tokens of latents that are none: see `Call.own`
                memory.spread = Tokens(group, inputs.latents.shape[1], inputs.text_tokens, drawn)
                memory.targets = memory.spread.targets
            request.signatures[branch] = _signature(inputs)
            request.texts[branch] = inputs.text
        request.latents[branch] = inputs.latents if request.schedule is None else None
        return request.memories[branch]


def _text(inputs: Inputs) -> tuple | None:
    text = inputs.text
    return None if text is None else (text.data_ptr(), text.shape, text.dtype)


_SIGNED = "shape", "dtype", "device", "prompt"


def _signature(inputs: Inputs) -> tuple:
    """What must stay the same from step to step; `_SIGNED` says what it is."""
    latents = inputs.latents
    return latents.shape, latents.dtype, latents.device, _text(inputs)


def _equal(a: Tensor | None, b: Tensor) -> bool:
    """Whether two latents are the same; a wait, unless they are one tensor."""
    return a is b or (a is not None and a.shape == b.shape and bool((a == b).all()))
