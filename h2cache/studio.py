"""Pictures of some prompts by different settings, compared with the uncached ones; shared among processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from h2cache.api import disable, enable
from h2cache.method import MethodConfig

SET_HERE = {  # arguments of a pipeline's call that are no one else's to give, and what to do instead
    "generator": 'noise goes by seed=N, or by "seed" in a prompt\'s dictionary',
    "output_type": "pictures are compared as arrays, so leave it out",
}
SAME_FOR_ALL = SET_HERE | dict.fromkeys(
    ("num_inference_steps", "timesteps", "sigmas"),
    "all prompts have the same steps, so give it to tune itself",
)

Prompt = str | Mapping[str, Any]  # a text, or arguments of the pipeline's call
T = TypeVar("T")


def psnr(picture: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of pictures with values in [0, 1], dB; at most 100."""
    error = float(np.mean((picture.astype(np.float64) - reference) ** 2))
    return 100.0 if error < 1e-10 else -10 * math.log10(error)


def eight_bits(picture: np.ndarray) -> np.ndarray:
    """As it is saved."""
    return np.round(np.clip(picture, 0, 1) * 255) / 255


class Studio:
    """Draws prompts with a pipeline and compares with the uncached pictures, which it keeps.

    call: arguments of every call of the pipeline, such as num_inference_steps. seed: of the first prompt.
    share: the processes among which the prompts are divided. name: what errors call the prompts.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[Prompt],
        call: dict[str, Any],
        seed: int,
        share: Share | None = None,
        name: str = "prompts",
    ) -> None:
        self.pipe, self.prompts, self.call, self.seed = pipe, list(prompts), call, seed
        self.name = name
        self.share = share or Share(None)
        self._references: dict[int, np.ndarray] = {}

    def draw(self, number: int, config: MethodConfig | None) -> np.ndarray:
        """The picture or video of a prompt, values in [0, 1]."""
        prompt, device = self.prompts[number], getattr(self.pipe, "_execution_device", "cpu")
        own = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
        seed = own.pop("seed", self.seed + number)
        disable(self.pipe) if config is None else enable(self.pipe, config)
        generator = torch.Generator("cpu" if str(device) == "mps" else device).manual_seed(int(seed))
        out = self.pipe(**self.call, **own, generator=generator, output_type="np")
        return np.asarray(out[0][0], dtype=np.float32)

    def reference(self, number: int) -> np.ndarray:
        """The uncached picture; ValueError if it has values that are not finite."""
        if number not in self._references:
            drawn = self.draw(number, None)
            if not np.isfinite(drawn).all():
                raise self.unfit(number, "the uncached picture")
            self._references[number] = drawn
        return self._references[number]

    def unfit(self, number: int, what: str) -> ValueError:
        """The error of a picture that no number can be had of."""
        return ValueError(
            f"{self.name}[{number}]: {what} has values that are not finite (NaN), so nothing can be compared "
            "with it: load the pipeline with another dtype, such as torch.bfloat16, or leave this prompt out"
        )

    def fidelity(self, number: int, config: MethodConfig, saved: bool = False) -> float:
        """PSNR of a prompt's picture; saved: of both as 8-bit pictures. -inf: it is not finite."""
        reference, drawn = self.reference(number), self.draw(number, config)
        if not np.isfinite(drawn).all():
            return -math.inf
        return psnr(eight_bits(drawn), eight_bits(reference)) if saved else psnr(drawn, reference)

    def measured(self, measure: Callable[[int], T]) -> list[T]:
        """What `measure` gives for the number of each prompt."""
        return list(self.share.each(range(len(self.prompts)), measure).values())


class Share:
    """The processes of `group` that share prompts, each every so many of them; None: this one is alone.

    All see all results, so all make the same decisions.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    @property
    def is_first(self) -> bool:
        """Whether this process writes for all."""
        return self.rank == 0

    def all(self, own: T) -> list[T]:
        """What each process has. ConnectionError if one of them has ended."""
        if self.group is None:
            return [own]
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, own, group=self.group)
        except RuntimeError as error:
            raise ConnectionError(
                "another process of the search has ended: what was measured is kept, and the same call goes "
                f"on from there ({str(error).splitlines()[0]})"
            ) from error
        return found

    def each(self, numbers: Sequence[int], measure: Callable[[int], T]) -> dict[int, T]:
        """What `measure` gives for each prompt of `numbers`; a prompt is always the same process's."""
        own = {n: measure(n) for n in numbers if n % self.size == self.rank}
        found = {n: value for part in self.all(own) for n, value in part.items()}
        return {n: found[n] for n in numbers}


def prompts_of(name: str, given: Iterable[Prompt] | None) -> list[Prompt]:
    """The prompts of an argument, checked."""
    if isinstance(given, (str, Mapping)):
        raise ValueError(f"{name}={given!r:.60} is one prompt: give a list, as in {name}=[...]")
    return [_prompt(f"{name}[{n}]", prompt) for n, prompt in enumerate(() if given is None else given)]


def _prompt(name: str, given: Any) -> Prompt:
    if isinstance(given, str):
        return str(given)  # numpy has a kind of its own
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{name} is a {type(given).__name__}: give a text, or a dictionary of the pipeline's arguments"
        )
    for key, why in SAME_FOR_ALL.items():
        if key in given:
            raise ValueError(f"{name} holds {key!r}: {why}")
    return dict(given)
