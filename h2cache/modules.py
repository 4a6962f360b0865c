"""Where, more finely: single modules of a block (attention, mlp), and the model's last layer.

While a method that asks for them is enabled, each of these modules has a forward of its own on the instance
that asks the current call what to do; outside a cached forward it is the module's own. Nothing is added to
the module tree, so state-dict keys stay, and `detach` restores exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from h2cache.engines import Engine
    from h2cache.stages import Call


@dataclass(frozen=True, slots=True)
class Modules:
    """How an engine divides a block: these modules' outputs determine what the block adds to the stream.

    answered: by name, each returns a tensor (B, tokens, C) or a tuple of such, before the gate.
    idle: their work only feeds answered modules. Where those are answered for, these give `(B, tokens, 0)`
    for each stream that they are given.
    """

    answered: dict[str, nn.Module]
    idle: tuple[nn.Module, ...] = field(default=())


class ModuleDriver:
    """The forwards put in place on one transformer."""

    def __init__(self, current_call: Callable[[], Call | None]) -> None:
        self._current_call = current_call
        self._restored: list[tuple[nn.Module, Any]] = []

    def attach(self, engine: Engine, transformer: nn.Module, required: frozenset[str]) -> None:
        """Drive what is `required`: "modules" of all blocks, "output". ValueError for compiled blocks."""
        if "modules" in required:
            self._attach_blocks(engine, [b for cut in engine.cuts for b in getattr(transformer, cut.blocks)])
        if "output" in required:
            self._put(engine.output_layer(transformer), self._output)

    def _attach_blocks(self, engine: Engine, blocks: list[nn.Module]) -> None:
        if any(getattr(block, "_compiled_call_impl", None) is not None for block in blocks):
            raise ValueError(
                "the blocks are compiled, which would freeze their modules into the graph: use "
                'granularity="stage", or do not compile'
            )
        for modules in map(engine.modules, dict.fromkeys(blocks)):
            for name, module in modules.answered.items():
                self._put(module, lambda own, name=name: self._answered(name, own))
            for module in modules.idle:
                self._put(module, self._idle)

    def detach(self) -> None:
        for module, own in self._restored:
            if own is None:
                del module.forward
            else:
                module.forward = own
        self._restored.clear()

    def _put(self, module: nn.Module, make: Callable[[Callable], Callable]) -> None:
        self._restored.append((module, vars(module).get("forward")))
        module.forward = make(module.forward)

    def _answered(self, name: str, own: Callable) -> Callable:
        def forward(*args, **kwargs):
            call = self._current_call()
            if call is None or call.driven is None:
                return own(*args, **kwargs)
            index, command = call.driven
            return command.answer(index, name, own, args, kwargs)

        return forward

    def _idle(self, own: Callable) -> Callable:
        def forward(*args, **kwargs):
            call = self._current_call()
            if call is None or call.driven is None or call.driven[1].counts:
                return own(*args, **kwargs)
            given = args or (kwargs["hidden_states"], kwargs.get("encoder_hidden_states"))
            img, txt = (*given, None)[:2]
            return img[..., :0] if txt is None else (img[..., :0], txt[..., :0])

        return forward

    def _output(self, own: Callable) -> Callable:
        def forward(*args, **kwargs):
            call = self._current_call()
            return own(*args, **kwargs) if call is None else call.output(own, args, kwargs)

        return forward
