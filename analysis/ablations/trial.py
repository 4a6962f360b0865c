"""What the ablations share: a model, prompts, and a picture of each by any method."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from analysis.cli import add_measuring_arguments, command_of, start
from analysis.drawing.draw import Drawn, draw
from analysis.drawing.prompts import Prompt, read_prompts
from analysis.options import Parser, at_least_one
from analysis.records import store
from h2cache import MethodConfig


def parser_of(description: str, out: str) -> argparse.ArgumentParser:
    """A parser with what every figure script takes: --out, --run, and the options of a run."""
    parser = Parser(description)
    parser.add_argument("--out", type=Path, default=Path("outputs") / out, help="default: %(default)s")
    parser.add_argument("--run", action="store_true", help="repeat the experiment, its records go to --out")
    run = parser.add_argument_group("of the experiment (with --run)")
    run.add_argument("--limit", type=at_least_one, help="only the first N prompts")
    add_measuring_arguments(run)
    return parser


def alone(run: Callable[[argparse.Namespace], Path]) -> Callable[[argparse.Namespace], Path]:
    """`run(args)` with --out for itself: a second run there would mix with it, and is refused."""

    @wraps(run)
    def guarded_run(args: argparse.Namespace) -> Path:
        with store.held(args.out):
            return run(args)

    return guarded_run


@dataclass
class Trial:
    """A model and its prompts, ready to draw."""

    pipeline: DiffusionPipeline
    call: dict[str, Any]
    prompts: list[Prompt]
    seed: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> Trial:
        """Load what the arguments of `parser_of` name; ValueError or OSError for what cannot be."""
        prompts = read_prompts(args.prompts)[: args.limit]
        pipeline, _, call, _ = start(args, prompts)
        return cls(pipeline, call, prompts, args.seed)

    def draw(self, prompt: Prompt, config: MethodConfig) -> Drawn:
        """The picture of `prompt` by the method of `config`."""
        seed = self.seed if prompt.seed is None else prompt.seed
        return draw(self.pipeline, config, seed, prompt=prompt.text, **self.call)


def write_about(folder: Path, module: str, args: argparse.Namespace) -> None:
    """Write `about.json`: command, machine, date and settings of the records in `folder`."""
    about = {
        "command": command_of(module),
        "machine": store.machine(args.device),
        "date": store.now(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
    }
    store.write_atomically(folder / "about.json", (json.dumps(about, indent=1) + "\n").encode())


def source_of(folder: Path) -> str:
    """Command, machine and date of the records in `folder`, in a line for a figure's words."""
    about = store.read_json(folder / "about.json") or store.read_json(folder / "table.json")
    about = about or store.read_json(folder / "summary.json")
    if about is None:
        return f"records of {folder}"
    machine = about["machine"]
    return f"`{about['command']}`, {machine['device_name']}, {machine['threads']} thread(s), {about['date']}"
