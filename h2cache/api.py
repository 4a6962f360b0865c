"""Attach a method to a pipeline or transformer, detach it, and sum up what it did.

Everything is kept on the object it was given: no global, no patched class. A transformer carries one
`Attachment`; its state is kept apart for each thread, request and guidance branch.
"""

from __future__ import annotations

import re
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from h2cache.engines import Engine, Inputs, class_names, find_engine
from h2cache.h2 import H2Config
from h2cache.memory import Memory, Request
from h2cache.method import Method, MethodConfig
from h2cache.records import StepRecord, Summary, summarise
from h2cache.stages import Call, Span, Stage

_ATTRIBUTE = "_h2cache"


def enable(target: Any, config: MethodConfig | None = None, *, steps: int | None = None) -> Any:
    """Cache the transformer of `target`, a diffusers pipeline or a transformer; returns `target`.

    config: the settings of a method, by default `H2Config()` with the paper's thresholds for FLUX.1-dev.
    steps: the number of steps of a request, for a bare transformer and methods that must know it (a pipeline
    tells it by itself). Enabling again replaces what was enabled before; `disable(target)` undoes it.

    Raises TypeError for a model without an engine or a config that is none, ValueError for a transformer that
    is compiled as a whole, has a cache of diffusers enabled, or lacks what the method needs: the step count,
    constants fitted to the checkpoint, or a finer cut than the engine offers.
    """
    config = H2Config() if config is None else config
    if not isinstance(config, MethodConfig):
        raise TypeError(
            f"config is a {type(config).__name__}: give a method's settings, such as H2Config(tau1=0.1)"
        )
    transformer = _transformer_of(target)
    engine = find_engine(transformer)
    if getattr(transformer, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "the transformer is compiled as a whole, which would freeze the decisions into the graph: "
            "compile its blocks instead, with transformer.compile_repeated_blocks()"
        )
    if getattr(transformer, "is_cache_enabled", False):
        raise ValueError(
            "diffusers' own cache is enabled on the transformer: call transformer.disable_cache() first"
        )
    pipeline = target if target is not transformer else None
    config = config.for_checkpoint(checkpoint_name(pipeline) or checkpoint_name(transformer))
    if missing := config.requires - engine.offers:
        raise ValueError(
            f"{config.name} with these settings needs of the model: {', '.join(sorted(missing))}; the engine "
            f"of {engine.name} cannot give that"
        )
    if config.needs_total_steps and steps is None and pipeline is None:
        raise ValueError(
            f"these settings of {config.name} must know the number of steps: enable it on the pipeline, "
            "or pass enable(transformer, config, steps=N)"
        )
    disable(transformer)
    setattr(transformer, _ATTRIBUTE, Attachment(transformer, engine, config, pipeline, steps))
    return target


def disable(target: Any) -> Any:
    """Put everything back as it was before `enable`; returns `target`. Harmless where none is on."""
    transformer = _transformer_of(target)
    attachment = getattr(transformer, _ATTRIBUTE, None)
    if attachment is not None:
        attachment.detach()
        delattr(transformer, _ATTRIBUTE)
    return target


def summary(target: Any) -> Summary:
    """What the newest request did: hits, blocks, measures, bytes; `print(summary(pipe))` shows a table.

    Raises ValueError when no cache is enabled on `target`.
    """
    return _attachment_of(target).summary()


def step_records(target: Any) -> list[StepRecord]:
    """The `StepRecord`s of the newest request, in the order of execution."""
    return list(_attachment_of(target).request.records)


def checkpoint_name(loaded: Any) -> str | None:
    """Last part of the folder or hub id that a pipeline or transformer was loaded from; None if made anew."""
    config = getattr(loaded, "config", None)
    path = config.get("_name_or_path") if isinstance(config, Mapping) else None
    parts = [part for part in re.split(r"[/\\]", path or "") if part not in ("", "transformer")]
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]  # the hub's cache
    return (cached or parts or [None])[-1]


def _transformer_of(target: Any) -> nn.Module:
    transformer = target if isinstance(target, nn.Module) else getattr(target, "transformer", None)
    if "OptimizedModule" in class_names(transformer):
        raise ValueError(
            "the transformer is wrapped by torch.compile, which would freeze the decisions into the graph: "
            "give the plain one and compile its blocks, with transformer.compile_repeated_blocks()"
        )
    if not isinstance(transformer, nn.Module):
        raise TypeError(
            f"{type(target).__name__} is no transformer and no pipeline with one (it has no .transformer)"
        )
    return transformer


def _attachment_of(target: Any) -> Attachment:
    attachment = getattr(_transformer_of(target), _ATTRIBUTE, None)
    if attachment is None:
        raise ValueError("no cache is enabled here: call h2cache.enable(pipe) first")
    return attachment


class Attachment:
    """A method on a transformer: the stages put in place, the hooks, and the state of each thread."""

    def __init__(
        self, transformer: nn.Module, engine: Engine, config: MethodConfig, pipeline: Any, steps: int | None
    ) -> None:
        self.engine, self.config, self.steps = engine, config, steps
        self.method: Method = config.build()
        self._transformer = weakref.ref(transformer)
        self._pipeline: Callable[[], Any] = weakref.ref(pipeline) if pipeline is not None else lambda: None
        self._local = threading.local()
        self._newest_request = Request((), None, "nothing has run yet")

        self._lists: dict[str, nn.ModuleList] = {}
        spans, first = [], 0
        for cut in engine.cuts:
            blocks = getattr(transformer, cut.blocks)
            self._lists[cut.blocks] = blocks
            spans.append(Span(cut.name, first, first + len(blocks), cut.joint))
            setattr(transformer, cut.blocks, Stage(blocks, cut.name, first, self._current_call))
            first += len(blocks)
        self.spans = tuple(spans)
        self._handles = (
            transformer.register_forward_pre_hook(self._begin, with_kwargs=True),
            transformer.register_forward_hook(self._end, always_call=True),
        )
        if hasattr(transformer, "cache_context"):
            transformer.cache_context = self._named_branch

    def detach(self) -> None:
        """Undo `__init__`, exactly."""
        transformer = self._transformer()
        for attribute, blocks in self._lists.items():
            setattr(transformer, attribute, blocks)
        for handle in self._handles:
            handle.remove()
        vars(transformer).pop("cache_context", None)

    @property
    def request(self) -> Request:
        """This thread's request, else the one that any thread began last."""
        return getattr(self._local, "request", None) or self._newest_request

    def summary(self) -> Summary:
        return summarise(self.config.name, self.request.records, self.request.bytes_held, self.request.reason)

    # One forward call: `_begin`, the model's own forward over our stages, `_end`.

    def _current_call(self) -> Call | None:
        return getattr(self._local, "call", None)

    @contextmanager
    def _named_branch(self, name: str, **kwargs: Any):
        """Stands before the transformer's own `cache_context` and notes the name of the guidance branch."""
        transformer = self._transformer()
        with type(transformer).cache_context(transformer, name, **kwargs):
            self._local.branch = name
            try:
                yield
            finally:
                self._local.branch = None

    def _begin(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if transformer.training:
            raise RuntimeError(
                "a cache is for inference: call transformer.eval(), or h2cache.disable it to train"
            )
        if self._current_call() is not None:  # the last one never came to its end (Ctrl-C): void
            self._forget("the call before was broken off")
        inputs = self.engine.inputs(args, kwargs)
        memory = self._memory(inputs)
        program = self.method.step(self.spans, memory)
        self._local.call = Call(self.engine, memory, program, inputs.adds_between)

    def _end(self, transformer: nn.Module, args: tuple, output: Any) -> None:
        call, self._local.call = self._current_call(), None
        if call is None or not call.finished:  # the forward raised
            self._forget("the call before was broken off")

    def _forget(self, reason: str) -> None:
        self._local.call = None
        self._local.request = None
        self._local.reason = reason

    # Which request, which branch.

    def _memory(self, inputs: Inputs) -> Memory:
        """The memory of the branch that this call belongs to, in this thread's request; new if in doubt."""
        token, total = self._request_token()
        batch = inputs.latents.shape[0]
        signature = _signature(inputs)
        request: Request | None = getattr(self._local, "request", None)
        reason = getattr(self._local, "reason", None) or "it is the first"
        if request is not None and (request.token[0] is not token[0] or request.token[1:] != token[1:]):
            request, reason = None, "the pipeline was called anew"
        branch = getattr(self._local, "branch", None)
        timestep: Tensor | float = inputs.timestep
        if branch is None:  # not named by the pipeline: it is the n-th call at one timestep
            timestep = timestep.reshape(-1)[0].item()  # a wait, only for pipelines that give no names
            last, calls = getattr(self._local, "position", (None, 0))
            calls = calls + 1 if request is not None and timestep == last else 0
            self._local.position = (timestep, calls)
            branch = f"call {calls}"
        if request is not None and request.signatures.get(branch, signature) != signature:
            changed = next(a[0] for a, b in zip(request.signatures[branch], signature, strict=True) if a != b)
            request, reason = None, f"another {changed} came in"
        if request is None:
            request = self._local.request = self._newest_request = Request(token, total, reason)
            self._local.reason = None
        if branch not in request.memories:
            request.memories[branch] = Memory(request, branch, batch)
            request.signatures[branch] = signature
            request.texts[branch] = inputs.text
        memory = request.memories[branch]
        memory.begin_step(timestep, inputs.conditions)
        return memory

    def _request_token(self) -> tuple[tuple, int | None]:
        """What stays the same during one pipeline call, and its number of steps."""
        pipeline = self._pipeline()
        if pipeline is None:
            return (None,), self.steps
        # `set_timesteps` makes a new tensor at each call; it is held, so that its address is not used again.
        timesteps = getattr(pipeline.scheduler, "timesteps", None)
        total = self.steps or getattr(pipeline, "num_timesteps", None)
        return (timesteps,), total or (None if timesteps is None else len(timesteps))


def _signature(inputs: Inputs) -> tuple:
    """What must stay the same from step to step, as (what, value) pairs."""
    latents, text = inputs.latents, inputs.text
    return (
        ("shape", latents.shape),
        ("dtype", latents.dtype),
        ("device", latents.device),
        ("prompt", None if text is None else (text.data_ptr(), text.shape, text.dtype)),
    )
