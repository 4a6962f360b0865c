"""Where, more finely: single modules of a block (attention, mlp), and the model's last layer.

While a method that asks for them is enabled, each of these modules has a forward of its own on the instance
that asks the current call what to do; outside a cached forward it is the module's own. Nothing is added to
the module tree, so state-dict keys stay, and `detach` restores exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from h2cache.drive import Call
from h2cache.engines.base import Engine

DRIVEN = frozenset({"modules", "output"})  # what a method requires of an engine and has answered here


def _blocks(engine: Engine, transformer: nn.Module) -> list[nn.Module]:
    """Each once: both stages may be of one list."""
    return list(dict.fromkeys(block for cut in engine.cuts for block in getattr(transformer, cut.blocks)))


def count_divided(engine: Engine, transformer: nn.Module) -> int:
    """How many blocks have attention and mlp apart; they are the first ones."""
    return sum(len(engine.modules(block).answered) > 1 for block in _blocks(engine, transformer))


def check_divisible(engine: Engine, transformer: nn.Module) -> None:
    """ValueError for blocks that are compiled, or that the engine cannot divide as they are."""
    count_divided(engine, transformer)
    blocks = _blocks(engine, transformer)
    if any(getattr(block, "_compiled_call_impl", None) is not None for block in blocks):
        raise ValueError(
            "the blocks are compiled, which would freeze their modules into the graph: use "
            'granularity="stage", or do not compile'
        )


class ModuleDriver:
    """The forwards put in place on one transformer."""

    def __init__(self, current_call: Callable[[], Call | None]) -> None:
        self._current_call = current_call
        self._put_in: list[tuple[nn.Module, Any, Callable]] = []  # module, what its instance had, and ours

    def attach(self, engine: Engine, transformer: nn.Module, required: frozenset[str]) -> None:
        """Drive what is `required`: "modules" of all blocks, "output"."""
        for module, make in self._wanted(engine, transformer, required):
            own = vars(module).get("forward")
            module.forward = make(module.forward)
            self._put_in.append((module, own, module.forward))

    def follow(self, engine: Engine, transformer: nn.Module, required: frozenset[str]) -> None:
        """Attach again if modules were exchanged since: a LoRA was loaded or taken away."""
        if "modules" in required:
            check_divisible(engine, transformer)
        wanted = [module for module, _ in self._wanted(engine, transformer, required)]
        if len(wanted) != len(self._put_in) or any(
            a is not b for a, (b, *_) in zip(wanted, self._put_in, strict=True)
        ):
            self.detach()
            self.attach(engine, transformer, required)

    def detach(self) -> None:
        for module, own, ours in self._put_in:
            if vars(module).get("forward") is not ours:
                continue  # somebody's hook stands before ours, which outside of a cached call does nothing
            if own is None:
                del module.forward
            else:
                module.forward = own
        self._put_in.clear()

    def _wanted(
        self, engine: Engine, transformer: nn.Module, required: frozenset[str]
    ) -> Iterator[tuple[nn.Module, Callable[[Callable], Callable]]]:
        """The modules to drive, each with what makes a forward of its own."""
        if "modules" in required:
            for modules in map(engine.modules, _blocks(engine, transformer)):
                for name, module in modules.answered.items():
                    yield module, partial(self._answered, name, modules.text.get(name, ""))
                for module in modules.idle:
                    yield module, self._idle
        if "output" in required:
            yield engine.output_layer(transformer), self._output

    def _answered(self, name: str, text: str, own: Callable) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = self._current_call()
            if call is None or call.driven is None:
                return own(*args, **kwargs)
            index, command = call.driven
            if not text or command.text or call.ran is None:
                return command.answer(index, name, own, args, kwargs)
            if text == "all":
                x = args[0] if args else kwargs["hidden_states"]
                return own(*args, **kwargs) if command.counts else _zeros(x, x.shape[1])
            txt = call.ran.before.txt
            ran: list[Any] = []  # the whole output, and what was seen of it
            count = 0 if txt is None else txt.shape[1]

            def image(*args: Any, **kwargs: Any) -> Any:
                full = own(*args, **kwargs)
                ran[:] = full, _image(full, text, count)
                return ran[1]

            answer = command.answer(index, name, image, args, kwargs)
            return ran[0] if ran and answer is ran[1] else _with_text(answer, text, count)

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


def _image(out: Any, text: str, count: int) -> Any:
    """What is not text in a module's output; copied out of a joined tensor, which a view would hold."""
    if text == "second":
        img, _, *more = out
        return (img, *more) if more else img
    return (out[:, count:] if text == "first" else out[:, : out.shape[1] - count]).clone()


def _with_text(img: Any, text: str, count: int) -> Any:
    """A module's output with `img` for what is not text, and 0 for the text."""
    if text == "second":
        first, *more = (img,) if isinstance(img, Tensor) else img
        return (first, _zeros(first, count), *more)
    return nn.functional.pad(img, (0, 0, count, 0) if text == "first" else (0, 0, 0, count))


def _zeros(like: Tensor, tokens: int) -> Tensor:
    """(B, tokens, C) in the memory of one number."""
    return like.new_zeros(()).expand(like.shape[0], tokens, like.shape[2])
