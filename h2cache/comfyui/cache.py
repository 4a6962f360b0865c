"""A method on a model of ComfyUI: three wrappers, which ComfyUI calls around a run, an evaluation and a call.

A run is one pass of a sampler. All that it keeps hangs on the options that ComfyUI hands from call to call,
and is freed when the pass ends, however it ends. Nothing is on the model, and nothing in a global.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from h2cache.api import sum_up
from h2cache.comfyui.blocks import Current, Seats, Walk
from h2cache.comfyui.engine import AnyModel, Flux, options_of
from h2cache.comfyui.sampling import Steps
from h2cache.engines.base import Inputs, lay_out
from h2cache.memory import Memory, Request
from h2cache.method import MethodConfig, Shape
from h2cache.program import Program, Stage, Stand, Stream
from h2cache.records import StepRecord, Summary
from h2cache.room import free_bytes, require_bytes, require_room

KEY = "h2cache"  # of our wrappers, and of the run in a call's options
MODEL = "diffusion_model"
RUN, EVALUATION, CALL = "sampler_sample", "predict_noise", "apply_model"  # ComfyUI's names, WrappersMP
OTHERS = {"easycache": "EasyCache or LazyCache"}  # keys in a call's options, of caches that we know


Fit = Callable[[MethodConfig, int, int], MethodConfig]


class Cache:
    """Settings of a method on one model, and the run that used them last.

    start, end: the method acts from and to this share of the sampling, in [0, 1] as ComfyUI counts it. fit:
    (config, evaluations of a run, those at which the method does not act) to the config of the run.
    """

    stages: tuple[Stage, ...] = ()

    def __init__(
        self, config: MethodConfig, start: float = 0.0, end: float = 1.0, fit: Fit = lambda config, *_: config
    ) -> None:
        if not 0 <= start < end <= 1:
            raise ValueError(
                f"start {start} and end {end}: they are shares of the sampling, and start is less"
            )
        self.config, self.start, self.end = config, start, end
        self.engine: AnyModel = AnyModel()
        self.fit = fit
        self.newest: Run | None = None

    def attach(self, patcher: Any) -> Any:
        """A clone of `patcher`, a ComfyUI model, with this method on it; one that was on it is replaced."""
        clone = without(patcher)
        for kind, wrapper in ((RUN, self.run), (EVALUATION, self.evaluate), (CALL, self.call)):
            clone.add_wrapper_with_key(kind, KEY, wrapper)
        return clone

    def run(
        self, executor: Any, guider: Any, sigmas: Tensor, extra_args: dict, *rest: Any, **named: Any
    ) -> Any:
        """Around one pass of a sampler."""
        options = extra_args["model_options"]["transformer_options"]  # ComfyUI's copy, for this pass
        self._refuse(options)
        noise = rest[1] if len(rest) > 1 else named["noise"]
        run = options[KEY] = self.newest = Run(self, executor.class_obj, guider, sigmas, noise.ndim)
        try:
            return executor(guider, sigmas, extra_args, *rest, **named)
        finally:
            options.pop(KEY, None)
            run.end()

    def evaluate(self, executor: Any, x: Tensor, sigma: Tensor, *rest: Any, **named: Any) -> Any:
        """Around one evaluation: the sampler asks, and all guidance branches are about to be called."""
        model_options = rest[0] if rest else named.get("model_options", {})
        run = model_options.get("transformer_options", {}).get(KEY)
        if run is not None:
            run.begin_evaluation(float(sigma.reshape(-1)[0]))  # a wait, once an evaluation
        return executor(x, sigma, *rest, **named)

    def call(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Around one call of the model, which has the rows of one guidance branch or of several."""
        run = options_of(args, kwargs).get(KEY)
        forward = partial(executor, *args, **kwargs)
        if run is None:
            return forward()
        inputs = self.engine.inputs(args, kwargs)
        branches = run.branches(options_of(args, kwargs), len(inputs.latents))
        if not run.active:
            for branch in branches:
                run.note_uncached(branch)
            return forward()
        return self._answer(run, branches, inputs, forward, executor.class_obj)

    def _answer(
        self, run: Run, branches: list[str], inputs: Inputs, forward: Callable[[], Tensor], model: Any
    ) -> Tensor:
        raise NotImplementedError

    def _refuse(self, options: dict[str, Any]) -> None:
        """ValueError, with what to do, for what cannot go together with a cache."""
        for key, name in OTHERS.items():
            if key in options:
                raise ValueError(
                    f"{name} is on this model too: remove it, or our node; two caches skip blindly"
                )


class WholeCache(Cache):
    """A method that answers for the whole model: the plan. Works on every model."""

    def _answer(
        self, run: Run, branches: list[str], inputs: Inputs, forward: Callable[[], Tensor], model: Any
    ) -> Tensor:
        x, sigma = inputs.latents, inputs.timestep
        parts = list(zip(x.chunk(len(branches)), sigma.chunk(len(branches)), strict=True))
        space = [Space(model.model_sampling, *part) for part in parts]
        steps = []
        for branch, part in zip(branches, parts, strict=True):
            memory = run.memory(branch, part[0], inputs)
            program = run.method.step((), memory)
            steps.append((memory, program, next(program)))
        if all(isinstance(command, Stand) for _, _, command in steps):
            result = None
            given: list[Tensor | None] = [None] * len(branches)
        else:  # a branch that has just begun wants the model: the others' rows run along
            result = forward()
            given = [*result.chunk(len(branches))]
        answers = []
        for (memory, program, command), mine, denoised in zip(steps, space, given, strict=True):
            if isinstance(command, Stand):
                denoised = mine.denoised(command.tensors[0])
                _send(program, None)
            else:
                assert denoised is not None  # it has run
                output = mine.output(denoised)
                if memory.bytes_needed is None:
                    needed = self.config.outputs_held * output.nbytes
                    memory.bytes_needed = require_bytes(self.config, needed, free_bytes(output.device))
                _send(program, [output])
            answers.append(denoised)
            memory.end_step(grew=not isinstance(command, Stand))
        stands = any(isinstance(command, Stand) for _, _, command in steps)
        return torch.cat(answers) if result is None or stands else result


class BlockCache(Cache):
    """A method that decides about the blocks of FLUX."""

    def __init__(self, config: MethodConfig, start: float = 0.0, end: float = 1.0) -> None:
        super().__init__(config, start, end)
        self._current = Current()

    def attach(self, patcher: Any) -> Any:
        clone = super().attach(patcher)
        inner = clone.model.diffusion_model
        served = type(inner).__name__
        if served not in Flux.serves:
            raise TypeError(
                f"no engine for the blocks of {served} in ComfyUI: {self.config.name} serves "
                f"{', '.join(Flux.serves)}. Use the node H2-Cache Plan, which works on every model"
            )
        self.engine = Flux(inner.patch_size)
        self.stages, firsts = lay_out(self.engine, inner, None)
        self._stage_of = tuple(stage.name for stage in self.stages for _ in stage.blocks)
        for cut in self.engine.cuts:
            name = f"{MODEL}.{cut.blocks}"
            seats = Seats(clone.get_model_object(name), cut.form, firsts[cut.blocks], self._current)
            clone.add_object_patch(name, seats)
        return clone

    def _refuse(self, options: dict[str, Any]) -> None:
        super()._refuse(options)
        if "torch.compile" in options.get("wrappers", {}).get(CALL, {}):
            raise ValueError(
                "the model is compiled as a whole, which would freeze decisions about blocks into the graph: "
                "remove TorchCompileModel, or use H2-Cache Plan, which works with it"
            )

    def _answer(
        self, run: Run, branches: list[str], inputs: Inputs, forward: Callable[[], Tensor], model: Any
    ) -> Tensor:
        # Rows of several branches decide together. Where ComfyUI batches them otherwise than before, for want
        # of memory, that is another branch, which begins by computing.
        memory = run.memory(" + ".join(branches), inputs.latents, inputs, guided=len(branches) == 2)
        entered = partial(self._reserve, memory) if memory.bytes_needed is None else None
        program = run.method.step(self.stages, memory)
        walk = Walk(program, memory, self._stage_of, inputs.adds_between, entered)
        self._current.walk = walk
        try:
            result = forward()
        finally:
            self._current.walk = None
        walk.finish()
        memory.end_step(memory.computed_a_stage(self.stages))
        return result

    def _reserve(self, memory: Memory, x: Stream) -> None:
        """Once a branch, before its first block: whether what the method keeps has room."""
        tokens, width = x.img.shape[1:]
        structure, detail = (len(stage.blocks) for stage in self.stages)
        shape = Shape(
            blocks=(structure, detail),
            img=tokens,
            txt=0 if x.txt is None else x.txt.shape[1],
            width=width,
            out=width,
            itemsize=x.img.element_size(),
            batch=memory.batch,
            drawn=len(range(tokens)[memory.targets or slice(None)]),
        )
        memory.bytes_needed = require_room(self.config, shape, free_bytes(x.img.device))


def cache_of(patcher: Any) -> Cache | None:
    """Our method on a ComfyUI model, if any."""
    found = patcher.get_wrappers(RUN, KEY)
    return found[0].__self__ if found else None


def without(patcher: Any) -> Any:
    """A clone of `patcher` without any method of ours on it."""
    clone = patcher.clone()
    for kind in (RUN, EVALUATION, CALL):
        clone.remove_wrappers_with_key(kind, KEY)
    for name in [name for name, patch in clone.object_patches.items() if isinstance(patch, Seats)]:
        del clone.object_patches[name]
    return clone


@dataclass(frozen=True)
class Space:
    """The model's own output, behind what `apply_model` gives: that is linear in it.

    Forecasts are made of outputs, as the samplers of diffusers see them.
    """

    model_sampling: Any
    x: Tensor
    sigma: Tensor

    def denoised(self, output: Tensor) -> Tensor:
        return self.model_sampling.calculate_denoised(self.sigma, output, self.x)

    def output(self, denoised: Tensor) -> Tensor:
        nothing = self.denoised(torch.zeros_like(denoised))
        slope = self.denoised(torch.ones_like(denoised)) - nothing
        return (denoised - nothing) / slope


@dataclass(eq=False)
class Run:
    """One pass of a sampler: its steps, where in them it is, and the memory of its guidance branches."""

    cache: Cache
    sampler: Any
    guider: Any
    sigmas: Tensor
    dimensions: int
    position: int = -1
    lost: bool = False  # the evaluations are not those that were expected
    _calls: Counter[tuple] = field(default_factory=Counter)  # of each branch, in this evaluation
    _names: dict[tuple, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model_sampling = self.guider.inner_model.model_sampling
        percents = (self.cache.start, self.cache.end)
        highest, lowest = (float(model_sampling.percent_to_sigma(percent)) for percent in percents)
        self.steps = Steps(self.sampler, self.guider, self.sigmas, self.dimensions)
        self.window = self.steps.between(highest, lowest)
        schedule = self.steps.schedule(model_sampling)
        request = self.request = Request(schedule, self.window.stop, "the sampler began")
        request.begun = self.window.start
        whole = len(self.steps)
        self.method = self.cache.fit(self.cache.config, whole, whole - len(self.window)).build()
        if self.window:
            request.course = schedule.course(self.window.start, len(self.window), (0,))

    @property
    def active(self) -> bool:
        """Whether the method acts at this evaluation."""
        return not self.lost and self.position in self.window

    @property
    def summary(self) -> Summary:
        return sum_up(self.cache.config, [self.request])

    def begin_evaluation(self, sigma: float) -> None:
        self.position += 1
        self._calls.clear()
        if not self.lost and not self.steps.are_at(self.position, sigma):
            self.lost = True
            self.request.release()
            self.request.said.append(
                f"evaluation {self.position} came at noise {sigma:.4g}, not as this sampler was expected to: "
                "nothing is skipped from there on"
            )

    def branches(self, options: dict[str, Any], rows: int) -> list[str]:
        """Names of the guidance branches whose rows are in a call, in equal parts."""
        kinds = options.get("cond_or_uncond") or [0]
        ids = options.get("uuids") or kinds
        if rows % len(ids) or len(ids) != len(kinds):
            kinds, ids = [0], [0]
        window = getattr(options.get("context_window"), "index_list", None)
        return [self._name(kind, (mark, repr(window))) for kind, mark in zip(kinds, ids, strict=True)]

    def _name(self, kind: int, mark: tuple) -> str:
        """The same name at every step; a branch that is called once more in one evaluation is another."""
        self._calls[mark] += 1
        key = (*mark, self._calls[mark])
        if key not in self._names:
            name = {0: "cond", 1: "uncond"}.get(kind, f"cond {kind}")
            taken = {*self._names.values()}
            free = (f"{name} {n}" for n in itertools.count(2))
            self._names[key] = name if name not in taken else next(n for n in free if n not in taken)
        return self._names[key]

    def memory(self, branch: str, rows: Tensor, inputs: Inputs, guided: bool = False) -> Memory:
        """The memory of a branch, at the step that begins; a new one if the inputs are of another form."""
        request, signature = self.request, (rows.shape, rows.dtype, rows.device)
        if request.signatures.setdefault(branch, signature) != signature:
            request.memories.pop(branch).release()
            request.signatures[branch] = signature
        if branch not in request.memories:
            request.memories[branch] = Memory(request, branch, len(rows), inputs.targets(), guided)
        memory = request.memories[branch]
        memory.begin_known_step(self.position, inputs.conditions)
        return memory

    def note_uncached(self, branch: str) -> None:
        """An evaluation at which the method does not act."""
        for name, blocks in [(stage.name, len(stage.blocks)) for stage in self.cache.stages] or [
            ("model", 1)
        ]:
            step = StepRecord(self.position, 0.0, branch, name, None, None, "miss", blocks, blocks)
            self.request.records.append(step)

    def end(self) -> None:
        """The sampler has ended, or was interrupted: what is kept is freed, the records stay."""
        self.request.release()
        self.sampler = self.guider = None


def _send(program: Program, seen: list[Tensor] | None) -> None:
    try:
        program.send(seen)
    except StopIteration:
        return
    raise RuntimeError("the method asks for more than one output of one call")
