"""What the fits of constants share: uncached runs that are watched, and the file of constants."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from analysis.cli import add_measuring_arguments, guarded, progress
from analysis.measuring import Trial
from analysis.options import Parser, at_least_one
from analysis.records import store
from analysis.records.provenance import provenance
from h2cache.api import checkpoint_name
from h2cache.memory import Memory
from h2cache.method import Method, MethodConfig
from h2cache.program import Look, Program, Run, Stage

Fit = Callable[[argparse.Namespace, Sequence[str] | None], None]
Seen = tuple[Tensor | None, Tensor]  # modulated input, where it is asked for, and residual of all blocks


@dataclass(frozen=True)
class WatchConfig(MethodConfig):
    """Uncached; a kind of it says what `point` two steps in a row make."""

    name = "watch"

    points: list[tuple] = field(default_factory=list)

    def point(self, memory: Memory, before: Seen, now: Seen) -> tuple:
        """What is noted of a step and the one before it, in the same guidance branch."""
        raise NotImplementedError

    def build(self) -> Watch:
        return Watch(self)


class Watch(Method):
    """Runs every block."""

    config: WatchConfig

    def __init__(self, config: WatchConfig) -> None:
        super().__init__(config)
        self.last: dict[str, Seen] = {}  # by guidance branch

    def step(self, stages: tuple[Stage, ...], memory: Memory) -> Program:
        modulated = (yield Look()) if "modulated input" in self.config.requires else None
        ran = yield Run(range(stages[-1].last))
        now = modulated, ran.residual.img
        if memory.step > 0:
            self.config.points.append(self.config.point(memory, self.last[memory.branch], now))
        self.last[memory.branch] = now
        for stage in stages:
            memory.record(stage, None, None, "miss")


def parser_of(description: str | None, constants: Path, limit: int | None) -> argparse.ArgumentParser:
    """A parser of the options of a fit; limit: prompts where none is asked for, None: all."""
    parser = Parser(description)
    add_measuring_arguments(parser)
    parser.add_argument("--limit", type=at_least_one, default=limit, help="number of prompts")
    parser.add_argument("--save", action="store_true", help=f"write the result into {constants}")
    return parser


def fit_script(parser: argparse.ArgumentParser, argv: list[str] | None, run: Fit, least: int = 2) -> int:
    """Exit code of `run(args, argv)`; least: the steps that it needs."""
    args = parser.parse_args(argv)
    if args.steps < least:
        parser.error(f"--steps {args.steps}: {least} steps at least are needed")
    return guarded(lambda: run(args, argv), "nothing is saved")


def watch(trial: Trial, kind: type[WatchConfig]) -> list[tuple]:
    """The points of all prompts, each after its prompt's id."""
    found = []
    for prompt in progress(trial.prompts, "prompt"):
        config = kind()
        trial.draw(prompt, config)
        found += [(prompt.id, *point) for point in config.points]
    return found


def source(module: str, args: argparse.Namespace, argv: Sequence[str] | None, *more: str) -> dict[str, Any]:
    """Where constants come from, in words, to stand beside them."""
    about = provenance(module, args.device, argv)
    where = about["machine"]["device_name"], about["date"][:10]
    return {"source": ", ".join([about["command"], f"{args.steps} steps", *more, *where])}


def save_constants(path: Path, trial: Trial, fitted: dict) -> None:
    """Put `fitted` into a file of constants, one checkpoint a line, under the name of the pipeline's."""
    table = json.loads(path.read_text(encoding="utf-8"))
    table[checkpoint_name(trial.pipeline)] = fitted
    rows = [f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in table.items()]
    store.write_atomically(path, ("{\n" + ",\n".join(rows) + "\n}\n").encode())
