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

from torch import Tensor, nn

from h2cache.engines import Engine, Inputs, class_names, find_engine, lay_out
from h2cache.h2 import H2Config
from h2cache.memory import Memory, Request
from h2cache.method import Method, MethodConfig, Shape
from h2cache.modules import DRIVEN, ModuleDriver, check_divisible
from h2cache.records import StepRecord, Summary, summarise
from h2cache.room import free_bytes, require_room
from h2cache.stages import Call, Stream

_ATTRIBUTE = "_h2cache"
MOST_BRANCHES = 4  # guidance branches that a pipeline without names for them may have


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
    held = sum(request.bytes_held for request in requests)
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
    requests = [attachment.request for attachment in _attachments_of(target)]
    newest = max(requests, key=lambda request: request.began)
    return [r for r in requests if r is newest or (r.token and r.token[0] is newest.token[0] is not None)]


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
        self._local = threading.local()
        self._newest_request = Request((), None, "nothing has run yet")

        self.spans, self._firsts = lay_out(engine, transformer, split)
        self._stage_of = tuple(span.name for span in self.spans for _ in span.blocks)
        self._take_out: Callable[[nn.Module], None] = lambda transformer: None
        self._handles: tuple = ()
        self._driver = ModuleDriver(self._current_call)

    def attach(self) -> None:
        """Put the stages and hooks in place."""
        transformer = self._transformer()
        self._take_out = self.engine.attach(transformer, self._firsts, self._current_call)
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

    @property
    def request(self) -> Request:
        """This thread's request, else the one that any thread began last."""
        return getattr(self._local, "request", None) or self._newest_request

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
        _check_usable(transformer, self.engine)  # something may have come since
        if transformer.training and self.engine.trainable:
            raise RuntimeError(
                "a cache is for inference: call transformer.eval(), or h2cache.disable it to train"
            )
        if self._current_call() is not None:  # the last one never came to its end (Ctrl-C): void
            self._forget("the call before was broken off")
        inputs = self.engine.inputs(args, kwargs)
        memory = self._memory(inputs)
        program = self.method.step(self.spans, memory)
        entered = partial(self._reserve, memory) if memory.bytes_needed is None else None
        call = Call(self.engine, self._stage_of, inputs, memory, program, entered)
        if self.config.requires & DRIVEN and memory.step == 0:  # once a request: it goes over all blocks
            self._driver.follow(self.engine, transformer, self.config.requires)
        self._local.call = call

    def _reserve(self, memory: Memory, x: Stream) -> None:
        """Refuse a request, before its first block, that would keep more than there is room for."""
        tokens, width = x.img.shape[1:]
        answers = "output" in self.engine.offers
        out = self.engine.output_layer(self._transformer()).out_features if answers else 0
        starts = [*self._firsts.values(), self.spans[-1].last]
        lists = tuple(b - a for a, b in itertools.pairwise(starts))
        shape = Shape(
            blocks=lists if len(lists) == 2 else tuple(len(span.blocks) for span in self.spans),
            img=tokens,
            txt=0 if x.txt is None else x.txt.shape[1],
            width=width,
            out=out,
            itemsize=x.img.element_size(),
            batch=memory.batch,
            drawn=len(range(tokens)[memory.targets or slice(None)]),
            text_compared=self.spans[-1].joint,
        )
        others = [m for m in self.request.memories.values() if m is not memory and m.bytes_needed]
        promised = sum(max(0, m.bytes_needed - m.bytes_held) for m in others)
        memory.bytes_needed = require_room(self.config, shape, free_bytes(x.img.device) - promised)

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
        token = self._request_token()
        batch = inputs.latents.shape[0]
        signature = _signature(inputs)
        request: Request | None = getattr(self._local, "request", None)
        reason = getattr(self._local, "reason", None) or "it is the first"
        if request is not None and request.token[0] is not token[0]:
            request, reason = None, "the pipeline was called anew"
        branch = getattr(self._local, "branch", None)
        timestep: Tensor | float = inputs.timestep
        if branch is None:  # not named by the pipeline: it is the n-th call at one timestep
            timestep = float(timestep.reshape(-1)[0])  # a wait, only for pipelines that give no names
            # In bfloat16 two steps may have one timestep: where the scheduler counts its steps, that tells.
            here = (timestep, getattr(getattr(self._pipeline(), "scheduler", None), "step_index", None))
            last, calls = getattr(self._local, "position", (None, 0))
            calls = calls + 1 if request is not None and here == last else 0
            self._local.position = (here, calls % MOST_BRANCHES)
            branch = f"call {calls % MOST_BRANCHES}"
            if calls == MOST_BRANCHES:
                request, reason = None, "the same timestep came again and again"
        if request is not None and request.signatures.get(branch, signature) != signature:
            changed = next(a[0] for a, b in zip(request.signatures[branch], signature, strict=True) if a != b)
            request, reason = None, f"another {changed} came in"
        if request is None:
            request = Request(token, self._total_steps(inputs.timestep), reason)
            self._local.request = self._newest_request = request
            self._local.reason = None
            self._release_others()
        if branch not in request.memories:
            request.memories[branch] = Memory(request, branch, batch, inputs.targets(), inputs.guided())
            request.signatures[branch] = signature
            request.texts[branch] = inputs.text
        memory = request.memories[branch]
        memory.begin_step(timestep, inputs.conditions)
        return memory

    def _release_others(self) -> None:
        """Free what the pipeline's other transformer keeps: its turn is over when this one's begins."""
        pipeline = self._pipeline()
        for transformer in _transformers_of(pipeline) if pipeline is not None else ():
            other = getattr(transformer, _ATTRIBUTE, None)
            request = getattr(other._local, "request", None) if other not in (None, self) else None
            if request is not None:
                request.release()

    def _request_token(self) -> tuple:
        """What stays the same during one pipeline call."""
        # `set_timesteps` makes a new tensor at each call; it is held, so that its address is not used again.
        return (getattr(getattr(self._pipeline(), "scheduler", None), "timesteps", None),)

    def _total_steps(self, timestep: Tensor) -> int | None:
        """How many steps of the request that begins at `timestep` are this transformer's; None: unknown."""
        pipeline = self._pipeline()
        if pipeline is None or self.steps:
            return self.steps
        total, timesteps = getattr(pipeline, "num_timesteps", None), self._request_token()[0]
        if timesteps is not None and self._transformer() is pipeline.transformer:
            # The pipeline may not be the one that runs: another may share its transformer and scheduler.
            counted = steps_from(timestep, timesteps)
            if total is None or (counted is not None and abs(counted - total) > 1):
                total = len(timesteps) if counted is None else counted
        return self.engine.own_steps(pipeline, self._transformer(), total)


def steps_from(timestep: Tensor, timesteps: Tensor) -> int | None:
    """How many of the scheduler's falling `timesteps` are left from `timestep` on; None if it is none.

    Models take them as they are, or divided by 1000. In bfloat16 a neighbour may be taken for it. A wait.
    """
    now, known = float(timestep.reshape(-1)[0]), timesteps.detach().float().cpu()
    for scale in (1.0, 1000.0):
        distance = (known / scale - now).abs()
        nearest = int(distance.argmin())
        if distance[nearest] <= 0.004 * float(known.max()) / scale:
            return len(known) - nearest
    return None


def _signature(inputs: Inputs) -> tuple:
    """What must stay the same from step to step, as (what, value) pairs."""
    latents, text = inputs.latents, inputs.text
    return (
        ("shape", latents.shape),
        ("dtype", latents.dtype),
        ("device", latents.device),
        ("prompt", None if text is None else (text.data_ptr(), text.shape, text.dtype)),
    )
