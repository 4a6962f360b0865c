"""A method on a denoiser: what is put in place, and whose state a call belongs to.

A method that decides about blocks has the model's block lists driven (`BlockAttachment`); one that answers
for the whole model stands before its call (`gate.py`).
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from inspect import signature
from types import FrameType
from typing import Any

import torch
from torch import nn

from h2cache.drive import Call, take_over
from h2cache.engines.base import Engine, lay_out
from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig, Shape
from h2cache.modules import DRIVEN, ModuleDriver, count_divided
from h2cache.parallel import check_together
from h2cache.program import Stream
from h2cache.requests import Requests
from h2cache.room import free_bytes, require_room
from h2cache.schedule import DENOISERS

COMPILED = (
    "the transformer is compiled as a whole, which would freeze the decisions into the graph: compile its "
    "blocks instead, with transformer.compile_repeated_blocks(), or use the plan, which works with a "
    "compiled model: h2cache.enable(pipe, speedup=5)"
)
_CACHING = {  # diffusers' modules of caches; its text_kv_cache is exact
    "faster_cache",
    "first_block_cache",
    "mag_cache",
    "pyramid_attention_broadcast",
    "sea_cache",
    "taylorseer_cache",
}
_NOTHING = object()
ATTRIBUTE = "_h2cache"  # of a denoiser, where its attachment is kept


def check_usable(transformer: nn.Module, engine: Engine) -> None:
    """ValueError, with what to do, if `transformer` cannot be cached as it is now."""
    if compiled_call(transformer) is not None:
        raise ValueError(COMPILED)
    refuse_other_caches(transformer)
    refuse_other_forward(transformer)
    engine.check(transformer)


def refuse_other_caches(denoiser: nn.Module) -> None:
    """ValueError if another library's cache is on `denoiser`; quick, for every call."""
    if getattr(denoiser, "is_cache_enabled", False):
        raise ValueError(
            "diffusers' own cache is enabled on the transformer: call transformer.disable_cache() first"
        )
    if vars(denoiser).get("_is_cached", getattr(type(denoiser), "_is_cached", False)):
        raise ValueError(
            "another library's cache is on the transformer (cache-dit, ParaAttention and nunchaku's "
            "first-block cache mark it so): undo it first, with cache_dit.disable_cache(pipe), or load the "
            "model again"
        )


def refuse_hooked_caches(denoiser: nn.Module) -> None:
    """ValueError if a cache of diffusers hooks into a part of `denoiser`; goes over all of its modules."""
    for name, module in denoiser.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook, made in getattr(registry, "hooks", {}).items():
            if type(made).__module__.rpartition(".")[2] in _CACHING:
                where = f"transformer.{name}".rstrip(".")
                raise ValueError(
                    f"diffusers' own cache hooks into {where} ({hook}): remove it from all parts, with "
                    f"_diffusers_hook.remove_hook({hook!r}), or load the model again"
                )


def refuse_other_forward(denoiser: nn.Module) -> None:
    """ValueError if somebody put another `forward` on `denoiser`: what it does between blocks is unknown.

    Hooks of accelerate and diffusers (offload, casting, parallelism) do too, and call the model's own.
    """
    forward: Any = vars(denoiser).get("forward")
    if forward is None:
        return
    while isinstance(forward, partial):
        forward = forward.func
    maker = getattr(forward, "__module__", None) or "?"
    if maker.partition(".")[0] not in ("accelerate", "diffusers"):
        name = getattr(forward, "__qualname__", forward)
        raise ValueError(
            f"transformer.forward has been replaced, by {name} of {maker}: another cache, or inputs that "
            "this one would not see. Put it back, with del transformer.forward, or use the plan, which "
            "stands before it: h2cache.enable(pipe, speedup=5)"
        )


def _refuse_to_compile(*args: Any, **kwargs: Any) -> None:
    """Stands for `Module.compile` of a model whose blocks are driven."""
    raise ValueError(COMPILED)


def wrapper_of(denoiser: nn.Module) -> Any:
    """The wrapper of torch.compile by which `denoiser` is called right now; None: it is not."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames else None
        if isinstance(caller, nn.Module) and getattr(caller, "_orig_mod", None) is denoiser:
            return caller
        frame = frame.f_back
    return None


def reason(text: str) -> dict[str, Any]:
    """The keyword of `torch.compiler.disable` that says why; none in torch 2.7."""
    return {"reason": text} if "reason" in signature(torch.compiler.disable).parameters else {}


def compiled_call(denoiser: nn.Module) -> Callable | None:
    """What a model compiled in place is called by, perhaps behind our gate; None: it is not compiled."""
    attachment = getattr(denoiser, ATTRIBUTE, None)
    own = getattr(denoiser, "_compiled_call_impl", None)
    return own if attachment is None else attachment.behind(own)


class Attachment:
    """A method on one denoiser, and the requests of each thread."""

    def __init__(
        self, denoiser: nn.Module, engine: Engine, config: MethodConfig, pipeline: Any, steps: int | None
    ) -> None:
        self.engine, self.config = engine, config
        self.method: Method = config.build()
        self._held = weakref.ref(denoiser)  # it holds this object
        self._pipeline: Callable[[], Any] = weakref.ref(pipeline) if pipeline is not None else lambda: None
        self._placed: dict[str, tuple[Any, Any]] = {}  # on the denoiser by name: ours, and what was there
        self.requests = Requests(denoiser, self._pipeline, steps, engine.starts, self._request_began)

    def _denoiser(self) -> nn.Module:
        denoiser = self._held()
        assert denoiser is not None  # nobody else holds this object
        return denoiser

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copied or pickled model would carry the state of another: refused, with what to do."""
        raise TypeError(
            f"the model has a cache enabled ({self.config.name}), which cannot be copied or saved with it: "
            "call h2cache.disable(model) first, and h2cache.enable on the copy"
        )

    def attach(self) -> None:
        """Put everything in place."""
        raise NotImplementedError

    def check_call(self) -> None:
        """RuntimeError if the model is called to be trained: a skipped step would cut the gradient."""
        denoiser = self._denoiser()
        if denoiser.training and self.engine.trainable:
            raise RuntimeError(
                "a cache is for inference: call .eval() on the model, or h2cache.disable it to train"
            )
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            recorded = any(p.requires_grad for p in denoiser.parameters())
            if recorded:
                raise RuntimeError(
                    "gradients are being recorded, and a skipped step would cut them: call the model under "
                    "torch.no_grad(), or h2cache.disable it"
                )

    def detach(self) -> None:
        """Undo `attach`, exactly."""
        raise NotImplementedError

    def behind(self, call: Callable | None) -> Callable | None:
        """What `call`, that of the denoiser, was before this attachment."""
        return call

    def _name_branches(self) -> None:
        denoiser = self._denoiser()
        if hasattr(denoiser, "cache_context"):
            placed = vars(denoiser).get("cache_context")  # by something else, before
            of_class: Any = getattr(type(denoiser), "cache_context", None)

            def own(name: str, **kwargs: Any) -> AbstractContextManager:  # nothing bound: it holds the model
                return placed(name, **kwargs) if placed else of_class(self._denoiser(), name, **kwargs)

            @contextmanager
            def named(name: str, **kwargs: Any) -> Iterator[None]:
                """The denoiser's own `cache_context`, with the name of the guidance branch noted."""
                before = self.requests.name_branch(name)
                try:
                    with own(name, **kwargs):
                        yield
                finally:
                    self.requests.name_branch(before)

            self._place("cache_context", named)

    def _place(self, name: str, value: Any) -> None:
        """Put `value` on the denoiser itself, before what its class has."""
        own = vars(self._denoiser())
        self._placed[name] = value, own.get(name, _NOTHING)
        own[name] = value

    def _take_away(self) -> None:
        """Undo `_place`, except where somebody else has put something over it since."""
        own = vars(self._denoiser())
        for name, (value, before) in self._placed.items():
            if own.get(name) is value:
                del own[name]
                if before is not _NOTHING:
                    own[name] = before
        self._placed.clear()

    def _request_began(self, pipeline: Any) -> None:
        """Free what the pipeline's other denoiser keeps: its turn is over when this one's begins."""
        for denoiser in [getattr(pipeline, name, None) for name in DENOISERS]:
            other = getattr(denoiser, ATTRIBUTE, None)
            if other not in (None, self) and other.requests.current is not None:
                other.requests.current.release()


class BlockAttachment(Attachment):
    """A method that decides about blocks: the driven lists put in place, and the hooks."""

    def __init__(
        self,
        transformer: nn.Module,
        engine: Engine,
        config: MethodConfig,
        pipeline: Any,
        steps: int | None,
        split: int | float | None,
    ) -> None:
        super().__init__(transformer, engine, config, pipeline, steps)
        self._calls = _CurrentCall()
        self.stages, self._firsts = lay_out(engine, transformer, split)
        self._stage_of = tuple(stage.name for stage in self.stages for _ in stage.blocks)
        self._take_out: Callable[[nn.Module], None] = lambda transformer: None
        self._handles: tuple = ()
        self._driver = ModuleDriver(self._current_call)

    def attach(self) -> None:
        """Put the stages and hooks in place."""
        transformer = self._denoiser()
        self._take_out = take_over(self.engine, transformer, self._firsts, self._current_call)
        self._driver.attach(self.engine, transformer, self.config.requires)
        self._handles = (
            transformer.register_forward_pre_hook(self._begin, with_kwargs=True),
            transformer.register_forward_hook(self._end, always_call=True),
        )
        self._place("compile", _refuse_to_compile)
        self._name_branches()

    def detach(self) -> None:
        """Undo `attach`, exactly."""
        transformer = self._denoiser()
        self._driver.detach()
        self._take_out(transformer)
        for handle in self._handles:
            handle.remove()
        self._take_away()

    def _request_began(self, pipeline: Any) -> None:
        super()._request_began(pipeline)
        self.engine.check_request(pipeline)

    # One forward call: `_begin`, the model's own forward over our stages, `_end`.

    def _current_call(self) -> Call | None:
        return self._calls.now

    @torch.compiler.disable(**reason(COMPILED))  # where it is traced nevertheless, that is what is said
    def _begin(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        check_usable(transformer, self.engine)  # something may have come since
        self.check_call()
        if self._current_call() is not None:  # the last one never came to its end (Ctrl-C): void
            self._forget("the call before was broken off")
        inputs = self.engine.inputs(args, kwargs)
        memory = self.requests.memory(inputs)
        if memory.bytes_needed is None:  # once a branch: what takes longer to see
            if wrapper_of(transformer) is not None:
                raise ValueError(COMPILED)
            check_together(transformer, self.engine, self.config.undivided)
            if "modules" in self.config.requires:
                memory.divided = count_divided(self.engine, transformer)
        program = self.method.step(self.stages, memory)
        entered = partial(self._reserve, memory) if memory.bytes_needed is None else None
        call = Call(self.engine, self._stage_of, inputs, memory, program, entered)
        if memory.group is not None:
            call.divide(transformer, memory.group)
        if self.config.requires & DRIVEN and memory.step == 0:  # once a request: it goes over all blocks
            self._driver.follow(self.engine, transformer, self.config.requires)
        self._calls.now = call

    def _reserve(self, memory: Memory, x: Stream) -> None:
        """Refuse a request, before its first block, that would keep more than there is room for."""
        call = self._current_call()
        assert call is not None  # it asks
        tokens, width = x.img.shape[1:]
        answers = "output" in self.engine.offers
        out = (
            int(getattr(self.engine.output_layer(self._denoiser()), "out_features", width)) if answers else 0
        )
        shape = Shape(
            blocks=(memory.divided, len(self._stage_of) - memory.divided),
            img=tokens,
            txt=0 if x.txt is None else x.txt.shape[1],
            width=width,
            out=out,
            itemsize=x.img.element_size(),
            batch=memory.batch,
            drawn=max(1, len(range(tokens)[memory.targets or slice(None)])),  # another process may have all
            text_compared=self.stages[-1].joint,
            modulated=call.inputs.modulated_tokens,
            attention_parts=call.inputs.attention_parts,
            latents=call.inputs.drawn(memory.targets).nbytes,
        )
        others = [m for m in self.requests.newest.memories.values() if m is not memory]
        promised = sum(max(0, (m.bytes_needed or 0) - m.bytes_held) for m in others)
        memory.bytes_needed = require_room(self.config, shape, free_bytes(x.img.device) - promised)

    def _end(self, transformer: nn.Module, args: tuple, output: Any) -> None:
        call, self._calls.now = self._calls.now, None
        request = self.requests.current
        if call is None or not call.finished or request is None:  # the forward raised
            self._forget("the call before was broken off")
        else:
            request.end_step(call.memory, call.drove or call.memory.computed_a_stage(self.stages))

    def _forget(self, reason: str) -> None:
        self._calls.now = None
        self.requests.forget(reason)


class _CurrentCall(threading.local):
    """The forward call that is under way, of each thread."""

    now: Call | None = None
