"""The contract of a caching method, and finding methods by their file name.

A method is one file: a frozen configuration dataclass and a `Method` whose `step` reads like the paper.
H2-Cache is `h2cache/h2.py`; every other method is a file in `baselines/`, found by its name alone.
"""

from __future__ import annotations

import importlib
import importlib.resources
import inspect
import json
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from h2cache.memory import Memory
    from h2cache.stages import Program, Span


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a model's hidden states in one guidance branch, to reckon what a method will keep."""

    blocks: tuple[int, int]  # of the structure and detail stage; double and single blocks in FLUX
    img: int  # image tokens
    txt: int  # text tokens
    width: int
    out: int  # channels of the model's output, for each image token
    itemsize: int = 2  # bytes of a number: 2 in bfloat16
    batch: int = 1
    drawn: int | None = None  # image tokens that are compared, without those of a reference; None: all
    text_compared: bool = True  # whether the detail stage's check looks at text tokens too

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
    requires: ClassVar[frozenset[str]] = frozenset()  # of an engine, beyond whole blocks: see `Engine.offers`
    instead: ClassVar[str] = ""  # what to use of an engine that cannot give that, as the end of a sentence

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

    @abstractmethod
    def build(self) -> Method:
        """The method with these settings."""


class Method(ABC):
    """One caching method. Holds settings only: everything that changes lives in the `Memory` of a request."""

    def __init__(self, config: MethodConfig) -> None:
        self.config = config

    @abstractmethod
    def step(self, stages: tuple[Span, ...], memory: Memory) -> Program:
        """One forward call: yield `Run` or `Skip` for every block, in order; `Run` gives back a `Ran`."""


def check(name: str, value: float, low: float, high: float, why: str) -> None:
    """Raise ValueError unless low <= value <= high; NaN is refused."""
    if not low <= value <= high:
        raise ValueError(f"{name}={value!r} is out of range [{low}, {high}]: {why}")


def fitted_constants(method: str, checkpoint: str | None) -> dict[str, Any]:
    """The constants of `method` fitted to `checkpoint`, with their source: `baselines/constants/METHOD.json`.

    Raises ValueError with the command that fits them when there are none.
    """
    path = importlib.resources.files("baselines") / "constants" / f"{method}.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    if checkpoint not in table:
        raise ValueError(
            f"{method} has no constants fitted to {checkpoint or 'this model, which has no name'}, only for "
            f"{', '.join(table)}: fit them with `python -m analysis.fit_{method} --model FOLDER --save`, or "
            f"name the checkpoint that the model was made of, as in checkpoint={next(iter(table))}"
        )
    return table[checkpoint]


def method_names() -> list[str]:
    """All methods that `find_method` knows: h2cache and the files of `baselines/`."""
    package = importlib.import_module("baselines")
    return ["h2cache", *sorted(m.name for m in pkgutil.iter_modules(package.__path__))]


def find_method(name: str) -> type[MethodConfig]:
    """The configuration class of the method `name`; ValueError lists the known ones."""
    if name not in method_names():
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(method_names())}")
    module = importlib.import_module("h2cache.h2" if name == "h2cache" else f"baselines.{name}")
    return _config_class(module)


def _config_class(module: ModuleType) -> type[MethodConfig]:
    found = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, MethodConfig) and c.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one MethodConfig, it defines {len(found)}")
    return found[0]


def parse_settings(config: type[MethodConfig], settings: list[str]) -> dict[str, Any]:
    """`["warmup_steps=3"]` as keyword arguments for `config`, each value in the type of the field's default.

    Raises ValueError for an unknown key (naming the known ones) or a value that does not fit its field.
    """
    known = {f.name: f for f in fields(config)}
    values = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in known:
            raise ValueError(
                f"cannot set {setting!r}: {config.name} has the fields {', '.join(known)} (key=value)"
            )
        try:
            values[key] = _parse(text, known[key].default, float if "float" in str(known[key].type) else int)
        except ValueError as error:
            raise ValueError(f"cannot set {key} to {text!r}: {error}") from None
    return values


def _parse(text: str, default: Any, number: type) -> Any:
    """`text` in the type of `default`; `number` is that of a field whose default is None."""
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError("write true or false")
        return text.lower() == "true"
    if default is None:
        return None if text.lower() == "none" else number(text)
    if isinstance(default, tuple):
        return tuple(float(part) for part in text.split("/"))
    return type(default)(text)
