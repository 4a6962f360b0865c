"""Attach a method to a pipeline or transformer, detach it, and sum up what it did.

Everything is kept on the object it was given: no global, no patched class. A transformer carries one
`Attachment`; its state is kept apart for each thread, request and guidance branch.
"""

from __future__ import annotations

import itertools
import re
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from h2cache.drive import Call, take_over
from h2cache.engines import find_engine
from h2cache.engines.base import Engine, class_names, lay_out
from h2cache.h2 import H2Config
from h2cache.memory import Memory, Request
from h2cache.method import Method, MethodConfig, Shape
from h2cache.modules import DRIVEN, ModuleDriver, check_divisible
from h2cache.program import Stream
from h2cache.records import StepRecord, Summary, summarise
from h2cache.requests import Requests
from h2cache.room import free_bytes, require_room

_ATTRIBUTE = "_h2cache"


def enable(
    target: Any,
    config: MethodConfig | None = None,
    *,
    steps: int | None = None,
    split: int | float | None = None,
) -> Any:
    """Cache the transformer of `target`, a diffusers pipeline or a transformer; returns `target`.

    config: the settings of a method, by default `H2Config()` with the paper's thresholds for FLUX.1-dev.
    steps: the number of steps of a request, for a bare transformer and methods that must know it (a pipeline
    tells it by itself).
    split: how many blocks are the structure stage, or their share in (0, 1); by default the model's own cut
    into two block lists, or a third of the only list. Enabling again replaces what was enabled before;
    `disable(target)` undoes it. A pipeline with two transformers (Wan 2.2) has both cached.

    Raises TypeError for a model without an engine or a config that is none, ValueError for a transformer that
    is compiled as a whole, has a cache of diffusers enabled, or lacks what the method needs: the step count,
    constants fitted to the checkpoint, a finer cut than the engine offers, or a block for each stage.
    """
    config = H2Config() if config is None else config
    if not isinstance(config, MethodConfig):
        raise TypeError(
            f"config is a {type(config).__name__}: give a method's settings, such as H2Config(tau1=0.1)"
        )
    transformers = _transformers_of(target)
    pipeline = target if target is not transformers[0] else None
    attachments = []
    for transformer in transformers:
        engine = find_engine(transformer)
        _check_usable(transformer, engine)
        if missing := config.requires - engine.offers:
            raise ValueError(
                f"{config.name} with these settings needs of the model: {', '.join(sorted(missing))}; the "
                f"engine of {engine.name} cannot give that{config.instead}"
            )
        if "modules" in config.requires:
            check_divisible(engine, transformer)
        fitted = config.for_checkpoint(checkpoint_name(pipeline) or checkpoint_name(transformer))
        if fitted.needs_total_steps and steps is None and pipeline is None:
            raise ValueError(
                f"these settings of {fitted.name} must know the number of steps: enable it on the pipeline, "
                "or pass enable(transformer, config, steps=N)"
            )
        attachments.append(Attachment(transformer, engine, fitted, pipeline, steps, split))
    disable(target)
    try:
        for transformer, attachment in zip(transformers, attachments, strict=True):
            setattr(transformer, _ATTRIBUTE, attachment)
            attachment.attach()
    except BaseException:
        disable(target)
        raise
    return target


def disable(target: Any) -> Any:
    """Put everything back as it was before `enable`; returns `target`. Harmless where none is on."""
    for transformer in _transformers_of(target):
        attachment = getattr(transformer, _ATTRIBUTE, None)
        if attachment is not None:
            attachment.detach()
            delattr(transformer, _ATTRIBUTE)
    return target


def summary(target: Any) -> Summary:
    """What the newest request did: hits, blocks, measures, bytes; `print(summary(pipe))` shows a table.

    Raises ValueError when no cache is enabled on `target`.
    """
    requests = _newest_requests(target)
    name = _attachments_of(target)[0].config.name
    held = max(request.most_bytes_held for request in requests)  # of two transformers one after the other
    needed = sum(request.bytes_needed for request in requests)
    return summarise(name, step_records(target), held, needed, requests[0].reason)


def step_records(target: Any) -> list[StepRecord]:
    """The `StepRecord`s of the newest request, in the order of execution.

    The steps of a second transformer are numbered on from those of the first.
    """
    records: list[StepRecord] = []
    for request in _newest_requests(target):
        done = 1 + max((r.step for r in records), default=-1)
        records += [replace(r, step=r.step + done, timestep=float(r.timestep)) for r in request.records]
    return records


def checkpoint_name(loaded: Any) -> str | None:
    """Last part of the folder or hub id that a pipeline or transformer was loaded from; None if made anew."""
    config = getattr(loaded, "config", None)
    path = config.get("_name_or_path") if isinstance(config, Mapping) else None
    parts = [part for part in re.split(r"[/\\]", path or "") if part not in ("", "transformer")]
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]  # the hub's cache
    return (cached or parts or [None])[-1]


def _transformers_of(target: Any) -> list[nn.Module]:
    if isinstance(target, nn.Module) or "OptimizedModule" in class_names(target):
        found = [target]
    else:
        found = [getattr(target, name, None) for name in ("transformer", "transformer_2")]
    for transformer in found:
        if "OptimizedModule" in class_names(transformer):
            raise ValueError(
                "the transformer is wrapped by torch.compile, which would freeze the decisions into the "
                "graph: give the plain one and compile its blocks, with "
                "transformer.compile_repeated_blocks()"
            )
    found = [transformer for transformer in found if isinstance(transformer, nn.Module)]
    if not found:
        raise TypeError(
            f"{type(target).__name__} is no transformer and no pipeline with one (it has no .transformer)"
        )
    return found


def _check_usable(transformer: nn.Module, engine: Engine) -> None:
    """ValueError, with what to do, if `transformer` cannot be cached as it is now."""
    if getattr(transformer, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "the transformer is compiled as a whole, which would freeze the decisions into the graph: "
            "compile its blocks instead, with transformer.compile_repeated_blocks()"
        )
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError(
            "diffusers' own cache is enabled on the transformer: call transformer.disable_cache() first"
        )
    engine.check(transformer)


def _attachments_of(target: Any) -> list[Attachment]:
    found = [getattr(transformer, _ATTRIBUTE, None) for transformer in _transformers_of(target)]
    if None in found:
        raise ValueError("no cache is enabled here: call h2cache.enable(pipe) first")
    return found


def _newest_requests(target: Any) -> list[Request]:
    """The requests of the newest pipeline call: one for each transformer that had a part in it."""
    requests = [attachment.requests.newest for attachment in _attachments_of(target)]
    newest = max(requests, key=lambda request: request.began)
    token = newest.schedule and newest.schedule.token
    if token is None:
        return [newest]
    return [r for r in requests if r.schedule is not None and r.schedule.token is token]


class Attachment:
    """A method on a transformer: the stages put in place, the hooks, and the state of each thread."""

    def __init__(
        self,
        transformer: nn.Module,
        engine: Engine,
        config: MethodConfig,
        pipeline: Any,
        steps: int | None,
        split: int | float | None,
    ) -> None:
        self.engine, self.config, self.steps = engine, config, steps
        self.method: Method = config.build()
        self._transformer = weakref.ref(transformer)
        self._pipeline: Callable[[], Any] = weakref.ref(pipeline) if pipeline is not None else lambda: None
        self._calls = _CurrentCall()
        self.requests = Requests(transformer, self._pipeline, steps, self._own_steps, self._release_others)
        self.stages, self._firsts = lay_out(engine, transformer, split)
        self._stage_of = tuple(stage.name for stage in self.stages for _ in stage.blocks)
        self._take_out: Callable[[nn.Module], None] = lambda transformer: None
        self._handles: tuple = ()
        self._driver = ModuleDriver(self._current_call)

    def attach(self) -> None:
        """Put the stages and hooks in place."""
        transformer = self._transformer()
        self._take_out = take_over(self.engine, transformer, self._firsts, self._current_call)
        self._driver.attach(self.engine, transformer, self.config.requires)
        self._handles = (
            transformer.register_forward_pre_hook(self._begin, with_kwargs=True),
            transformer.register_forward_hook(self._end, always_call=True),
        )
        if hasattr(transformer, "cache_context"):
            transformer.cache_context = self._named_branch

    def detach(self) -> None:
        """Undo `attach`, exactly."""
        transformer = self._transformer()
        self._driver.detach()
        self._take_out(transformer)
        for handle in self._handles:
            handle.remove()
        vars(transformer).pop("cache_context", None)

    # One forward call: `_begin`, the model's own forward over our stages, `_end`.

    def _current_call(self) -> Call | None:
        return self._calls.now

    @contextmanager
    def _named_branch(self, name: str, **kwargs: Any):
        """Stands before the transformer's own `cache_context` and notes the name of the guidance branch."""
        transformer = self._transformer()
        with type(transformer).cache_context(transformer, name, **kwargs), self.requests.named_branch(name):
            yield

    def _begin(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        _check_usable(transformer, self.engine)  # something may have come since
        if transformer.training and self.engine.trainable:
            raise RuntimeError(
                "a cache is for inference: call transformer.eval(), or h2cache.disable it to train"
            )
        if self._current_call() is not None:  # the last one never came to its end (Ctrl-C): void
            self._forget("the call before was broken off")
        inputs = self.engine.inputs(args, kwargs)
        memory = self.requests.memory(inputs)
        program = self.method.step(self.stages, memory)
        entered = partial(self._reserve, memory) if memory.bytes_needed is None else None
        call = Call(self.engine, self._stage_of, inputs, memory, program, entered)
        if self.config.requires & DRIVEN and memory.step == 0:  # once a request: it goes over all blocks
            self._driver.follow(self.engine, transformer, self.config.requires)
        self._calls.now = call

    def _reserve(self, memory: Memory, x: Stream) -> None:
        """Refuse a request, before its first block, that would keep more than there is room for."""
        tokens, width = x.img.shape[1:]
        answers = "output" in self.engine.offers
        out = self.engine.output_layer(self._transformer()).out_features if answers else 0
        starts = [*self._firsts.values(), self.stages[-1].last]
        lists = tuple(b - a for a, b in itertools.pairwise(starts))
        shape = Shape(
            blocks=lists if len(lists) == 2 else tuple(len(stage.blocks) for stage in self.stages),
            img=tokens,
            txt=0 if x.txt is None else x.txt.shape[1],
            width=width,
            out=out,
            itemsize=x.img.element_size(),
            batch=memory.batch,
            drawn=len(range(tokens)[memory.targets or slice(None)]),
            text_compared=self.stages[-1].joint,
        )
        others = [m for m in self.requests.newest.memories.values() if m is not memory and m.bytes_needed]
        promised = sum(max(0, m.bytes_needed - m.bytes_held) for m in others)
        memory.bytes_needed = require_room(self.config, shape, free_bytes(x.img.device) - promised)

    def _end(self, transformer: nn.Module, args: tuple, output: Any) -> None:
        call, self._calls.now = self._calls.now, None
        request = self.requests.current
        if call is None or not call.finished or request is None:  # the forward raised
            self._forget("the call before was broken off")
        else:
            request.end_step(call.memory)

    def _forget(self, reason: str) -> None:
        self._calls.now = None
        self.requests.forget(reason)

    def _own_steps(self, pipeline: Any, total: int | None) -> int | None:
        return self.engine.own_steps(pipeline, self._transformer(), total)

    def _release_others(self, pipeline: Any) -> None:
        """Free what the pipeline's other transformer keeps: its turn is over when this one's begins."""
        for transformer in _transformers_of(pipeline) if pipeline is not None else ():
            other = getattr(transformer, _ATTRIBUTE, None)
            if other not in (None, self) and other.requests.current is not None:
                other.requests.current.release()


class _CurrentCall(threading.local):
    """The forward call that is under way, of each thread."""

    now: Call | None = None
