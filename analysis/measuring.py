"""The one loop that measures: contestants draw the same prompts in turns, and rows are kept as they come."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from diffusers import DiffusionPipeline

from analysis.cli import add_measuring_arguments, progress, start
from analysis.drawing.draw import Drawn, draw
from analysis.drawing.prompts import Prompt, read_prompts
from analysis.options import Parser, at_least_one
from analysis.records import store
from analysis.records.provenance import write_about
from h2cache import MethodConfig

C, D = TypeVar("C"), TypeVar("D")


@dataclass
class Trial:
    """A model and its prompts, ready to draw."""

    pipeline: DiffusionPipeline
    call: dict[str, Any]
    prompts: Sequence[Prompt]
    seed: int
    settings: dict[str, Any]  # what records must tell apart: model, steps, size, guidance, seed, ...

    @classmethod
    def of(
        cls, args: argparse.Namespace, prompts: Sequence[Prompt] | None = None, device: str | None = None
    ) -> Trial:
        """Load what `args` name; ValueError or OSError for what cannot be."""
        prompts = read_prompts(args.prompts)[: args.limit] if prompts is None else prompts
        pipeline, _, call, settings = start(args, prompts, device)
        settings |= {"device": pipeline.device.type, "dtype": str(pipeline.dtype)}
        return cls(pipeline, call, prompts, args.seed, settings)

    def seed_of(self, prompt: Prompt) -> int:
        """The prompt's own seed, else that of all."""
        return self.seed if prompt.seed is None else prompt.seed

    def key(self, prompt: Prompt, name: str) -> str:
        """Names the row of a contestant: everything that decides what is measured."""
        told = {"id": prompt.id, "prompt": prompt.text, "seed": self.seed_of(prompt), "contestant": name}
        return store.run_key(**self.settings | told)

    def draw(self, prompt: Prompt, config: MethodConfig, **other: Any) -> Drawn:
        """The picture of `prompt` by the method of `config`; `other` arguments replace those of the call."""
        call = self.call | other | {"prompt": prompt.text}
        return draw(self.pipeline, config, self.seed_of(prompt), **call)

    def warm_up(self, prompt: Prompt, configs: Sequence[MethodConfig]) -> None:
        """One whole picture by the first method, and a few steps of each, untimed."""
        few = {"num_inference_steps": min(4, self.call["num_inference_steps"]), "output_type": "latent"}
        self.draw(prompt, configs[0])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*too few steps")  # of these four
            for config in {config.name: config for config in configs}.values():
                self.draw(prompt, config, **few)


def turns(contestants: Iterable[C], number: int) -> list[C]:
    """In which order they draw the prompt of this number: each prompt in another, so that a machine that
    drifts is fair."""
    order = list(contestants)
    shift = number % len(order)
    return order[shift:] + order[:shift]


def measure(
    path: Path,
    prompts: Sequence[Prompt],
    contestants: Mapping[str, C],
    draw: Callable[[Prompt, C], D],
    rows_of: Callable[[Prompt, dict[str, D]], dict[str, dict]],
    key_of: Callable[[Prompt, str], str],
    done: Iterable[str] | None = None,
    begin: Callable[[Prompt], None] = lambda prompt: None,
) -> None:
    """Every contestant draws every prompt; the rows are kept in `path`, prompt by prompt.

    A run that was stopped goes on: a prompt whose keys are all there is not drawn again. Rows that were not
    asked for are of another run, and go at the end; not so with `done`, which names the keys that count, in
    this file and others. rows_of: from the prompt and what each contestant drew, a row for each. begin:
    called with the first prompt that is drawn, to warm up.
    """
    finished, asked, begun = {*(store.tidy(path) if done is None else done)}, set(), False
    for number, prompt in enumerate(progress(prompts, "prompt")):
        keys = {name: key_of(prompt, name) for name in contestants}
        asked |= {*keys.values()}
        if finished.issuperset(keys.values()):
            continue
        if not begun:
            begin(prompt)
            begun = True
        # All pictures first, then what is read of them, which would leave cold caches to the next picture.
        drawn = {name: draw(prompt, contestants[name]) for name in turns(contestants, number)}
        found = rows_of(prompt, {name: drawn[name] for name in contestants})
        new = [{"key": keys[name], "id": prompt.id} | row for name, row in found.items()]
        store.add_records(path, {row["key"]: row for row in new})
    kept = store.tidy(path)
    if done is None and kept.keys() - asked:
        store.write_records(path, {key: row for key, row in kept.items() if key in asked})


# Scripts that draw a figure from records, and repeat the experiment with --run.


def parser_of(description: str, out: str) -> argparse.ArgumentParser:
    """A parser with what every figure script takes: --out, --run, and the options of a run."""
    parser = Parser(description)
    parser.add_argument("--out", type=Path, default=Path("outputs") / out, help="default: %(default)s")
    parser.add_argument("--run", action="store_true", help="repeat the experiment, its records go to --out")
    run = parser.add_argument_group("of the experiment (with --run)")
    run.add_argument("--limit", type=at_least_one, help="only the first N prompts")
    add_measuring_arguments(run)
    return parser


Run = Callable[[argparse.Namespace], Path]


def recorded(module: str) -> Callable[[Run], Run]:
    """`run(args)` of a figure script, alone in --out (a second run there is refused), with an about.json."""

    def decorate(run: Run) -> Run:
        @wraps(run)
        def alone(args: argparse.Namespace) -> Path:
            with store.held(args.out):
                path = run(args)
                write_about(args.out, module, args)
                return path

        return alone

    return decorate
