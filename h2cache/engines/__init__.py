"""Which model: an engine tells where a transformer is cut and how to read its blocks' arguments.

One file per model family. An engine never names a method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from h2cache.engines.forms import Form
from h2cache.modules import Modules
from h2cache.stages import Span, Stream


@dataclass(frozen=True, slots=True)
class Cut:
    """One stage of a model: the attribute that holds its blocks, and what its check looks at.

    Two cuts of one list share it: the first has `share` of its blocks, the second the rest.
    """

    name: str  # "structure" or "detail"
    blocks: str  # attribute of the transformer, an nn.ModuleList
    form: Form  # of these blocks
    joint: bool = False  # check text and image tokens together, or image tokens only
    share: float | None = None  # of the blocks, in (0, 1); None: all that are left of the list


def one_stack(blocks: str, form: Form) -> tuple[Cut, Cut]:
    """The cuts of a model with one block list: a third is structure, as in FLUX (19 of 57 blocks) [ours]."""
    return Cut("structure", blocks, form, share=1 / 3), Cut("detail", blocks, form)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a cache must know of one forward call of the transformer."""

    timestep: Tensor  # any shape; its first value counts; it falls during a request
    latents: Tensor  # (B, ...), without what is there in some steps only
    text: Tensor | None  # the text states (B, S, C) or classes: another tensor means another prompt
    conditions: tuple  # hashable; a change of it during a request makes stored residuals void
    adds_between: bool = True  # the model itself may add something after each block: it must see every index
    targets: Callable[[], slice | None] = lambda: None  # image tokens that are drawn; asked once a branch
    guided: Callable[[], bool] = lambda: False  # batch is [cond, uncond]: one decision for both halves; ditto

    @property
    def text_tokens(self) -> int:
        """S, for blocks that take text and image tokens in one tensor; 0 where text is no such states."""
        return self.text.shape[1] if self.text is not None and self.text.ndim == 3 else 0


class Engine(ABC):
    """What a model family must tell."""

    name: str
    serves: str  # name of the transformer's class; subclasses are served too
    cuts: tuple[Cut, ...]
    offers: frozenset[str] = frozenset()  # what methods may require beyond whole blocks: "modulated input"

    def matches(self, transformer: nn.Module) -> bool:
        """Whether this engine serves `transformer` (by class name: no optional package is imported)."""
        return self.serves in class_names(transformer)

    @abstractmethod
    def inputs(self, args: tuple, kwargs: dict[str, Any]) -> Inputs:
        """Read a forward call's arguments."""

    def modulated_input(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The image tokens (B, I, C) in a block call's arguments after the block's first norm and modulation.

        Only asked of engines that offer "modulated input"; the block itself does not run.
        """
        raise NotImplementedError(f"{self.name} does not offer it")

    def modules(self, block: nn.Module) -> Modules:
        """How `block` divides into modules. Only asked of engines that offer "modules"."""
        raise NotImplementedError(f"{self.name} does not offer it")

    def with_input(self, args: tuple, kwargs: dict[str, Any], stream: Stream) -> tuple[tuple, dict[str, Any]]:
        """A block call's arguments with another stream. Only asked of engines that offer "modules"."""
        raise NotImplementedError(f"{self.name} does not offer it")

    def output_layer(self, transformer: nn.Module) -> nn.Module:
        """The last layer, whose output is the model's. Only asked of engines that offer "output"."""
        raise NotImplementedError(f"{self.name} does not offer it")

    def own_steps(self, pipeline: Any, transformer: nn.Module, total: int | None) -> int | None:
        """How many of a request's `total` steps `transformer` takes: all, unless a pipeline has several."""
        return total


def lay_out(
    engine: Engine, transformer: nn.Module, split: int | float | None
) -> tuple[tuple[Span, ...], dict[str, int]]:
    """The stages of `transformer`, and the number of the first block of each of its lists.

    split: how many blocks are structure, or their share in (0, 1); None: as the engine has it.
    """
    firsts, spans, end = {}, [], 0
    for cut in engine.cuts:
        count = len(getattr(transformer, cut.blocks))
        first = firsts.setdefault(cut.blocks, end)
        start, end = end, first + (count if cut.share is None else _share(count, cut.share))
        spans.append(Span(cut.name, start, end, cut.joint))
    if split is not None:
        at = _share(end, split) if isinstance(split, float) else split
        structure, detail = spans
        spans = [replace(structure, last=at), replace(detail, first=at)]
    if any(not len(span.blocks) for span in spans):
        sizes = " and ".join(f"{len(span.blocks)} {span.name}" for span in spans)
        raise ValueError(
            f"split={split!r} cuts the {end} blocks of this {type(transformer).__name__} into {sizes}: each "
            "stage needs one at least"
        )
    return tuple(spans), firsts


def _share(count: int, share: float) -> int:
    """`share` of `count` blocks, at least one."""
    return max(1, round(count * share))


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
