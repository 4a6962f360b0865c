"""Which model: an engine tells where a transformer is cut and how to read its blocks' arguments.

One file per model family. An engine never names a method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from h2cache.stages import Stream


@dataclass(frozen=True, slots=True)
class Cut:
    """One stage of a model: the attribute that holds its blocks, and what its check looks at."""

    name: str  # "structure" or "detail"
    blocks: str  # attribute of the transformer, an nn.ModuleList
    joint: bool  # check text and image tokens together, or image tokens only


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a cache must know of one forward call of the transformer."""

    timestep: Tensor  # any shape; its first value counts
    latents: Tensor  # (B, I, C_in)
    text: Tensor | None  # the text states: another tensor means another prompt
    conditions: tuple  # hashable; a change of it during a request makes stored residuals void
    adds_between: bool = True  # the model itself may add something after each block: it must see every index


class Engine(Protocol):
    """What a model family must provide."""

    name: str
    cuts: tuple[Cut, ...]
    offers: frozenset[str]  # what methods may require beyond whole blocks, such as "modulated input"

    def matches(self, transformer: nn.Module) -> bool:
        """Whether this engine serves `transformer` (by class name: no optional package is imported)."""

    def inputs(self, args: tuple, kwargs: dict[str, Any]) -> Inputs:
        """Read a forward call's arguments."""

    def read_input(self, args: tuple, kwargs: dict[str, Any]) -> Stream:
        """The stream in a block call's arguments."""

    def read_output(self, output: Any) -> Stream:
        """The stream in a block's return value."""

    def write_output(self, stream: Stream) -> Any:
        """A block's return value made of `stream`."""

    def modulated_input(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The image tokens (B, I, C) in a block call's arguments after the block's first norm and modulation.

        Only asked of engines that offer "modulated input"; the block itself does not run.
        """

    def pass_through(self, *args: Any, **kwargs: Any) -> Any:
        """A block that does nothing."""


def find_engine(transformer: nn.Module) -> Engine:
    """The engine that serves `transformer`; TypeError names the class and the known ones."""
    from h2cache.engines.flux_diffusers import FluxDiffusers

    engines = (FluxDiffusers(),)
    for engine in engines:
        if engine.matches(transformer):
            return engine
    raise TypeError(
        f"no engine for {type(transformer).__name__}: h2cache serves {', '.join(e.name for e in engines)}. "
        "A new model is one file in h2cache/engines/."
    )


def class_names(obj: object) -> set[str]:
    """Names of the class of `obj` and of all its bases."""
    return {c.__name__ for c in type(obj).__mro__}
