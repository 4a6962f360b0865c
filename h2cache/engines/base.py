"""What an engine must tell of a model family: where it is cut and how to read its blocks' arguments.

An engine describes; it builds nothing and never names a method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from h2cache.engines.forms import Form
from h2cache.program import Driver, Stage


@dataclass(frozen=True, slots=True)
class Modules:
    """How an engine divides a block: these modules' outputs determine what the block adds to the stream.

    answered: by name, each returns a tensor (B, tokens, C) or a tuple of such, before the gate.
    idle: their work only feeds answered modules. Where those are answered for, these give `(B, tokens, 0)`
    for each stream that they are given.
    text: where text tokens are in the output of an answered module, by its name: "all" of it, the "second" of
    its tensors, or its "first" or "last" tokens. Only of models whose output does not read the text: where
    all modules are answered for, text may then be anything.
    """

    answered: dict[str, nn.Module]
    idle: tuple[nn.Module, ...] = field(default=())
    text: dict[str, str] = field(default_factory=dict)


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


@dataclass(slots=True, eq=False)
class Inputs:
    """What a cache must know of one forward call of the transformer."""

    timestep: Tensor  # any shape; its first value counts; it falls during a request
    latents: Tensor  # (B, ...), without what is there in some steps only
    text: Tensor | None  # the text states (B, S, C) or classes: another tensor means another prompt
    conditions: tuple  # hashable; a change of it during a request makes stored residuals void
    adds_between: bool = True  # the model itself may add something after each block: it must see every index
    attention_parts: int = 2  # tensors that an attention of both streams gives; IP-Adapter's is a third
    modulated_tokens: int | None = None  # of the "modulated input"; None: the image tokens that are drawn
    targets: Callable[[], slice | None] = lambda: None  # image tokens that are drawn; asked once a branch
    guided: Callable[[], bool] = lambda: False  # batch is [cond, uncond]: one decision for both halves; ditto

    def drawn(self, targets: slice | None) -> Tensor:
        """The latents without the tokens of a reference image; targets: the drawn tokens, None: all.

        A copy of its own where some are left out: who keeps it must not keep the others with it.
        """
        whole = targets is None or self.latents.ndim != 3
        return self.latents if whole else self.latents[:, targets].clone()

    @property
    def text_tokens(self) -> int:
        """S, for blocks that take text and image tokens in one tensor; 0 where text is no such states."""
        return self.text.shape[1] if self.text is not None and self.text.ndim == 3 else 0


class Engine(ABC):
    """What a model family must tell."""

    name: str
    serves: tuple[str, ...]  # names of the transformers' classes; subclasses are served too
    cuts: tuple[Cut, ...]
    offers: frozenset[str] = frozenset()  # beyond whole blocks: "modulated input", "modules", "output"
    trainable = True  # its models are trained too: a cache refuses them in training mode

    def check(self, transformer: Any) -> None:
        """Raise ValueError, with what to do, if `transformer` cannot be cached as it is now."""
        return None

    def check_request(self, pipeline: Any) -> None:
        """Raise ValueError, with what to do, if the call of `pipeline` that begins cannot be cached."""
        return None

    def count(self, transformer: Any, cut: Cut) -> int:
        """How many blocks are in the list of `cut`."""
        return len(getattr(transformer, cut.blocks))

    def take_over(
        self, transformer: Any, firsts: dict[str, int], current_call: Callable[[], Driver | None]
    ) -> Callable[[nn.Module], None] | None:
        """Let `current_call()` drive blocks that are no list; returns what undoes it. None: they are lists.

        firsts: number of the first block of each list.
        """
        return None

    @abstractmethod
    def inputs(self, args: tuple, kwargs: dict[str, Any]) -> Inputs:
        """Read a forward call's arguments."""

    def modulated_input(self, block: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The image tokens (B, I, C) in a block call's arguments after the block's first norm and modulation.

        Only asked of engines that offer "modulated input"; the block itself does not run.
        """
        raise NotImplementedError(f"{self.name} does not offer it")

    def modules(self, block: Any) -> Modules:
        """How `block` divides into modules. Only asked of engines that offer "modules"."""
        raise NotImplementedError(f"{self.name} does not offer it")

    def output_layer(self, transformer: Any) -> nn.Module:
        """The last layer, whose output is the model's. Only asked of engines that offer "output"."""
        raise NotImplementedError(f"{self.name} does not offer it")

    def starts(self, pipeline: Any, steps: int, begun: int) -> tuple[int, ...]:
        """The first step of each of the pipeline's denoisers, of a request of `steps` steps.

        begun: index of its first step in the scheduler's timesteps. (0,) unless a pipeline has several.
        """
        return (0,)


def lay_out(
    engine: Engine, transformer: nn.Module, split: int | float | None
) -> tuple[tuple[Stage, ...], dict[str, int]]:
    """The stages of `transformer`, and the number of the first block of each of its lists.

    split: how many blocks are structure, or their share in (0, 1); None: as the engine has it.
    """
    firsts: dict[str, int] = {}
    stages: list[Stage] = []
    end = 0
    for cut in engine.cuts:
        count = engine.count(transformer, cut)
        first = firsts.setdefault(cut.blocks, end)
        start, end = end, first + (count if cut.share is None else _share(count, cut.share))
        stages.append(Stage(cut.name, start, end, cut.joint))
    if split is not None:
        at = _share(end, split) if isinstance(split, float) else split
        structure, detail = stages
        stages = [replace(structure, last=at), replace(detail, first=at)]
    if any(not len(stage.blocks) for stage in stages):
        sizes = " and ".join(f"{len(stage.blocks)} {stage.name}" for stage in stages)
        raise ValueError(
            f"split={split!r} cuts the {end} blocks of this {type(transformer).__name__} into {sizes}: each "
            "stage needs one at least"
        )
    return tuple(stages), firsts


def _share(count: int, share: float) -> int:
    """`share` of `count` blocks, at least one."""
    return max(1, round(count * share))


def class_names(obj: object) -> set[str]:
    """Names of the class of `obj` and of all its bases."""
    return {c.__name__ for c in type(obj).__mro__}


def same_halves(latents: Tensor) -> bool:
    """Whether a batch is the same latents twice, which is how [cond, uncond] look in one call."""
    first, second = latents[: len(latents) // 2], latents[len(latents) // 2 :]
    return len(latents) % 2 == 0 and torch.equal(first, second)  # a wait, once a request
