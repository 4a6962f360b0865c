"""The contract of a caching method, and the checks that its settings share.

A method is one file: a frozen configuration dataclass and a `Method` whose `step` reads like the paper.
H2-Cache is `h2cache/h2.py`; every other method is a file in `baselines/`, found by its name alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar

from typing_extensions import Self

from h2cache.memory import Memory
from h2cache.program import Program, Stage


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a model's hidden states in one guidance branch, to compute what a method will keep."""

    blocks: tuple[int, int]  # with attention and mlp apart, and with both in one: FLUX's double and single
    img: int  # image tokens
    txt: int  # text tokens
    width: int
    out: int  # channels of the model's output, for each image token
    itemsize: int = 2  # bytes of a number: 2 in bfloat16
    batch: int = 1
    drawn: int | None = None  # image tokens that are compared, without those of a reference; None: all
    text_compared: bool = True  # whether the detail stage's check looks at text tokens too
    modulated: int | None = None  # tokens of the first block's modulated input; None: those compared
    attention_parts: int = 2  # tensors that an attention of both streams gives; IP-Adapter's is a third
    latents: int | None = None  # bytes of the latents, without a reference; None: as many as the output's

    @property
    def denoised(self) -> int:
        """Bytes of the latents that are drawn."""
        return self.tensor(self.compared[0], self.out) if self.latents is None else self.latents

    @property
    def compared(self) -> tuple[int, int]:
        """How many tokens the structure and the detail check look at."""
        drawn = self.img if self.drawn is None else self.drawn
        return drawn, drawn + self.txt * self.text_compared

    def tensor(self, tokens: int, width: int | None = None) -> int:
        """Bytes of a tensor of so many tokens."""
        return self.batch * tokens * (self.width if width is None else width) * self.itemsize

    @property
    def joint(self) -> int:
        """Bytes of text and image tokens between two blocks."""
        return self.tensor(self.img + self.txt)


@dataclass(frozen=True)
class MethodConfig(ABC):
    """Settings of one method. Subclasses are frozen dataclasses that validate in `__post_init__`."""

    name: ClassVar[str]  # as written in records and tables
    outputs_held: ClassVar[int] = 0  # of the model, in each branch, by a method that requires "whole"
    latents_held: ClassVar[int] = 0  # of its inputs, likewise: they may be larger (FLUX Fill, Control)
    reuses: ClassVar[bool] = True  # False: a control that runs everything, so that no hit is no surprise
    instead: ClassVar[str] = ""  # what to use of an engine that cannot give that, as the end of a sentence

    @property
    def undivided(self) -> str:
        """Why a picture's tokens must all be in one process, to begin a sentence with; empty: no need."""
        return ""

    @property
    def requires(self) -> frozenset[str]:
        """What is needed of an engine beyond whole blocks: see `Engine.offers`."""
        return frozenset()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse settings of another type, before they are compared with any range."""
        names = [f.name for f in fields(cls) if f.init]
        kinds = {f.name: str(f.type) for f in fields(cls)}
        for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
            check_type(f"{cls.name}: {name}", value, kinds.get(name, ""))
        return super().__new__(cls)

    def for_checkpoint(self, checkpoint: str | None) -> MethodConfig:
        """These settings with the constants fitted to `checkpoint` (last part of its folder or hub id).

        Methods with fitted constants override this and raise ValueError, naming the command that fits them,
        for a checkpoint without any.
        """
        return self

    def requested_steps(self, steps: int) -> int:
        """How many steps to ask of a pipeline where the user asked for `steps`."""
        return steps

    def bytes_needed(self, shape: Shape) -> int:
        """The most bytes that a request keeps from step to step, for each guidance branch."""
        return 0

    @property
    def needs_total_steps(self) -> bool:
        """Whether these settings need the number of steps of a request before it starts."""
        return False

    @property
    def wanted_psnr(self) -> float | None:
        """The fidelity that pictures are asked to have, dB; None: a speed or thresholds are asked for."""
        return None

    @abstractmethod
    def build(self) -> Method:
        """The method with these settings."""


class Method(ABC):
    """One caching method. Holds settings only: everything that changes lives in the `Memory` of a request."""

    def __init__(self, config: MethodConfig) -> None:
        self.config = config

    @abstractmethod
    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        """One forward call: yield `Run` or `Skip` for every block, in order; `Run` gives back a `Ran`."""


_NUMBERS: dict[str, type] = {"float": Real, "int": Integral}


def check_type(name: str, value: Any, kind: str) -> None:
    """Raise TypeError unless `value` is of the annotated `kind`: a number, bool, str, tuple of them, or None.

    A bool is no number, and text is none either: "0.1" would fail in mid-run. Other kinds are not checked.
    """
    *options, _ = [*(part.strip() for part in kind.split("|")), ""]
    for option in options:
        inner = option.removeprefix("tuple[").removesuffix(", ...]")
        if option == "None":
            fits = value is None
        elif inner in _NUMBERS:
            values = [value] if inner == option else value
            whole = isinstance(values, (list, tuple))
            fits = whole and all(_is_number(v, _NUMBERS[inner]) for v in values)
        elif option in ("bool", "str"):
            fits = isinstance(value, bool if option == "bool" else str)
        else:
            return
        if fits:
            return
    if options:
        raise TypeError(f"{name}={value!r} is {type(value).__name__}, not {kind}")


def _is_number(value: Any, kind: type) -> bool:
    """A limit may be infinite where a whole number is asked for."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    return real and (isinstance(value, kind) or float(value).is_integer() or float(value) == math.inf)


def check(name: str, value: float, low: float, high: float, why: str) -> None:
    """Raise ValueError unless low <= value <= high; NaN is refused."""
    if not low <= value <= high:
        raise ValueError(f"{name}={value!r} is out of range [{low}, {high}]: {why}")
