"""How blocks take and return the hidden states. A family's engine picks one form for each of its block lists.

In all of them image tokens are the first argument and text tokens the second, by position or by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from h2cache.program import Stream


def argument(args: tuple, kwargs: dict[str, Any], position: int, name: str) -> Any:
    """An argument of a call, given by position or by name; None where it was not given."""
    return args[position] if len(args) > position else kwargs.get(name)


class Form(Protocol):
    """What the stages must know of a block's arguments and return value.

    text_tokens: S, how many text tokens this forward call has; 0 where the blocks see none.
    """

    joined: bool  # the model joins the streams to one tensor before this list

    def read_input(self, args: tuple, kwargs: dict[str, Any], text_tokens: int) -> Stream:
        """The stream in a block call's arguments."""

    def read_output(self, output: Any, text_tokens: int) -> Stream:
        """The stream in a block's return value."""

    def write_output(self, stream: Stream) -> Any:
        """A block's return value made of `stream`."""

    def pass_through(self, *args: Any, **kwargs: Any) -> Any:
        """What a block would return that does nothing."""


@dataclass(frozen=True)
class TwoStreams:
    """Blocks that take and return image and text tokens apart; the last one may return no text (SD3)."""

    text_first: bool  # in the return value
    joined = False

    def read_input(self, args: tuple, kwargs: dict[str, Any], text_tokens: int = 0) -> Stream:
        return Stream(
            argument(args, kwargs, 0, "hidden_states"), argument(args, kwargs, 1, "encoder_hidden_states")
        )

    def read_output(self, output: tuple, text_tokens: int = 0) -> Stream:
        first, second = output
        return Stream(second, first) if self.text_first else Stream(first, second)

    def write_output(self, stream: Stream) -> tuple:
        return (stream.txt, stream.img) if self.text_first else (stream.img, stream.txt)

    def pass_through(self, *args: Any, **kwargs: Any) -> tuple:
        return self.write_output(self.read_input(args, kwargs))


@dataclass(frozen=True)
class OneStream:
    """Blocks that take and return one tensor which the model does not divide (text comes in beside it)."""

    joined = False

    def read_input(self, args: tuple, kwargs: dict[str, Any], text_tokens: int = 0) -> Stream:
        return Stream(argument(args, kwargs, 0, "hidden_states"))

    def read_output(self, output: Tensor, text_tokens: int = 0) -> Stream:
        return Stream(output)

    def write_output(self, stream: Stream) -> Tensor:
        return stream.img

    def pass_through(self, *args: Any, **kwargs: Any) -> Tensor:
        return argument(args, kwargs, 0, "hidden_states")


@dataclass(frozen=True)
class Joined:
    """Blocks that take and return one tensor of text tokens, then image tokens: (B, S + I, C)."""

    joined = True

    def read_input(self, args: tuple, kwargs: dict[str, Any], text_tokens: int) -> Stream:
        return self.read_output(argument(args, kwargs, 0, "hidden_states"), text_tokens)

    def read_output(self, output: Tensor, text_tokens: int) -> Stream:
        return Stream(output[:, text_tokens:], output[:, :text_tokens])

    def write_output(self, stream: Stream) -> Tensor:
        return stream.joint  # (B, S + I, C)

    def pass_through(self, *args: Any, **kwargs: Any) -> Tensor:
        return argument(args, kwargs, 0, "hidden_states")
