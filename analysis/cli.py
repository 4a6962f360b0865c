"""What the command-line scripts share: starting a model, the settings asked for, and how they end."""

from __future__ import annotations

import argparse
import errno
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from analysis import stop
from analysis.drawing.draw import Limits, default_device, prepare, require_memory
from analysis.drawing.families import add_family_arguments
from analysis.drawing.load import load
from analysis.drawing.prompts import Prompt, check_text
from analysis.options import at_least_one, one_line, seed, side, speak_anyhow
from analysis.records.store import CHECKOUT
from analysis.settings import parse_settings
from h2cache import MethodConfig, find_method
from h2cache.presets import PRESETS, Preset, find_preset, last_part

ERRORS = (ValueError, TypeError, OSError, ImportError, MemoryError, torch.OutOfMemoryError)


def shipped(path: str) -> str:
    """A file of the checkout: as it is when run from there, which keeps records short, else absolute."""
    return path if Path(path).exists() else str(CHECKOUT / path)


TINY = shipped("assets/tiny_flux")


def is_embedded(model: str) -> bool:
    """Whether `model` is the one that ships with the repository, however its folder is written."""
    return last_part(model) == "tiny_flux"


def warn(text: str) -> None:
    """One line on stderr."""
    say(f"warning: {text}")


def say(text: str) -> None:
    """One line on stderr, if anybody still reads there."""
    with suppress(OSError, ValueError):
        print(one_line(text), file=sys.stderr, flush=True)


ADVICE = {
    errno.ENOSPC: "free some space there, then give the same command again",
    errno.EACCES: "give a place that you may read and write",
    errno.EPERM: "give a place that you may read and write",
    errno.EROFS: "give a place that you may write to",
    errno.ENOENT: "check the path",
    errno.EISDIR: "a file is needed, this is a folder",
    errno.ENOTDIR: "a folder is needed, this is a file",
    errno.EEXIST: "a folder is needed, this is a file",
    errno.ENAMETOOLONG: "shorten the name",
}


def told(error: BaseException) -> str:
    """An error in words: of one that is a number only, the path and what to do."""
    if isinstance(error, OSError) and error.strerror:
        place = error.filename if error.filename is not None else "the output"
        return f"{place}: {error.strerror}: {ADVICE.get(error.errno or 0, 'check that place')}"
    return str(error) or type(error).__name__


def _lacks_memory(error: Exception) -> bool:
    """Whether a RuntimeError of torch says that main memory is too small."""
    return re.search("can't allocate memory|not enough memory|calculation overflowed", str(error)) is not None


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is an exception again, which `analysis` had changed while modules load."""
    if signal.getsignal(signal.SIGINT) is not stop:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, stop)


def _flush() -> None:
    """Write what is left; where nobody reads, drop it, or Python complains at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def guarded(work: Callable[[], int | None], kept: str) -> int:
    """Exit code of `work()`; Ctrl-C and what a user can correct become one line on stderr, not a traceback.

    kept: what becomes of the work done, printed after Ctrl-C.
    """
    speak_anyhow()
    with warnings.catch_warnings(), _interruptible():
        usual = warnings.showwarning

        def show(message: Warning, category: type[Warning], *where: Any) -> None:
            warn(str(message)) if issubclass(category, UserWarning) else usual(message, category, *where)

        warnings.showwarning = show
        warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers|transformers|torch")
        try:
            code = work() or 0
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            say(f"stopped: {kept}")
            return 130
        except BrokenPipeError:  # `... | head` has read enough
            return 1
        except ERRORS as error:
            say(f"error: {told(error)}")
            return 2
        except RuntimeError as error:
            if not _lacks_memory(error):
                raise
            say(f"error: {error}: lower the size")
            return 2
        finally:
            _flush()


T = TypeVar("T")


def progress(
    items: Iterable[T], unit: str, what: str | None = None, shown: bool = True, total: int | None = None
) -> Iterator[T]:
    """`items` with a bar on stderr; where that is no terminal, a line at each tenth that is done.

    total: how many there are, where several processes share them; the bar counts those of this one.
    """
    if total is None:
        items = list(items)
        total = len(items)
    if not shown or sys.stderr.isatty():
        yield from tqdm(items, what, total, unit=unit, disable=not shown)
        return
    say(f"{total} {unit}s to go")
    for number, item in enumerate(items, 1):
        yield item
        if number * 10 // total > (number - 1) * 10 // total:
            say(f"{number} of {total} {unit}s done")


def figure_script(main: Callable[[list[str] | None], int]) -> Callable[[list[str] | None], int]:
    """`main(argv)` of a figure script with its exit codes: 0 all drawn, 1 something left out and named, 2 an
    error in plain words, 130 stopped with Ctrl-C."""

    @wraps(main)
    def script(argv: list[str] | None = None) -> int:
        return guarded(lambda: main(argv), "what was drawn is kept, and --run goes on from there")

    return script


# Settings.


PLANNED, PAPER = ("speedup", "evaluations", "psnr"), ("tau1", "tau2")  # options that belong to one method


def chosen(args: argparse.Namespace) -> list[tuple[MethodConfig, Preset | None]]:
    """What to draw with: the method that the options name, or H2-Cache and the plan.

    Each with its preset, where something of that is left.
    """
    plan = [f"--{name}" for name in PLANNED if getattr(args, name) is not None]
    paper = [f"--{name}" for name in PAPER if getattr(args, name) is not None]
    named = args.method or (PRESETS[args.preset].method if args.preset else None)
    if named not in (None, "plan") and plan:
        raise ValueError(f"{plan[0]} belongs to the plan, not to {named}")
    if (named or "h2cache") != "h2cache" and paper:
        raise ValueError(f"{paper[0]} belongs to h2cache, not to {named}")
    if plan and paper:
        raise ValueError(f"{plan[0]} belongs to the plan, {paper[0]} to h2cache: give one of them")
    named = named or ("plan" if plan else "h2cache" if paper or args.set else None)
    return [settings(args, name) for name in ([named] if named else ["h2cache", "plan"])]


def settings(args: argparse.Namespace, method: str) -> tuple[MethodConfig, Preset | None]:
    """The settings of `method`: a preset's or the defaults, overridden by its options and --set."""
    kind = find_method(method)
    preset = PRESETS[args.preset] if args.preset else find_preset(args.model, method)
    if preset and preset.config.name != method:
        raise ValueError(f"--preset {args.preset} is one of {preset.config.name}, not of {method}")
    names = PLANNED if method == "plan" else PAPER
    given = [f"{k}={getattr(args, k)}" for k in names if getattr(args, k) is not None] + args.set
    if not preset and not given and fields(kind) and method != "plan":
        hint = f"; measure: python -m analysis.calibrate --model {args.model}" * (method == "h2cache")
        warn(f"nothing has been measured for {method} on {args.model}: its defaults are used{hint}")
    replaced = parse_settings(kind, given)
    left = preset if preset and not preset.settings.keys() <= replaced.keys() else None
    return replace(preset.config, **replaced) if preset else kind(**replaced), left


def size_of(call: dict[str, Any]) -> str | None:
    """HEIGHTxWIDTH of a pipeline's call; None where the model has one size only."""
    return f"{call['height']}x{call['width']}" if "height" in call and "width" in call else None


# Starting.


TINY_PROMPTS = Path(shipped("assets/prompts/tiny32.jsonl"))


def add_model_arguments(parser: argparse.ArgumentParser, prompts: Path | None) -> None:
    """Model, prompts (and their default), steps, seed, size, and what else a family takes."""
    parser.add_argument("--model", default=TINY, help="folder or hub id (default: %(default)s)")
    told = "%(default)s" if prompts else "our 80 for CUTE80, its short words for the embedded"
    parser.add_argument("--prompts", type=Path, default=prompts, help=f"default: {told}")
    parser.add_argument("--steps", type=at_least_one, default=50)
    parser.add_argument("--seed", type=seed, default=0, help="for prompts without one of their own")
    parser.add_argument("--height", type=side, help="pixels (default: the model's)")
    parser.add_argument("--width", type=side, help="pixels (default: the model's)")
    add_family_arguments(parser)


def add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of scripts that fit constants or draw ablations: what `start` reads, and --prompts."""
    add_model_arguments(parser, TINY_PROMPTS)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: by device")
    parser.set_defaults(engine="diffusers", checkpoint=None, lora=None, lora_scale=None, offload=False)


def check_prompts(limits: Limits, prompts: Sequence[Prompt]) -> None:
    """Warn of what the model was not made for; ValueError for what is no text."""
    for prompt in prompts:
        check_text(prompt.text)
        for text in limits.warnings(prompt.text):
            warn(f"{prompt.id}: {text}")


def start(
    args: argparse.Namespace, prompts: Sequence[Prompt], device: str | None = None
) -> tuple[DiffusionPipeline, str, dict[str, Any], dict[str, Any]]:
    """Check size and prompts, load what `args` ask for, and get it ready for --steps steps.

    Returns the pipeline, its name in records, the arguments of its call, and those that records must tell
    apart: steps, size, guidance, seed, and what else was asked for.
    """
    limits = Limits.of(args.model)
    limits.check_size(args.height, args.width)
    require_memory(args.height, args.width, args.frames)
    check_prompts(limits, prompts)
    torch.set_num_threads(limits.cpu_threads or torch.get_num_threads())
    pipeline, name = load(args, device)
    pipeline, call, further = prepare(pipeline, limits, args)
    pipeline.set_progress_bar_config(disable=True)
    call["num_inference_steps"] = args.steps
    settings = {
        "model": name,
        "steps": args.steps,
        "height": call.get("height"),
        "width": call.get("width"),
        "guidance": call.get("guidance_scale"),
        "seed": args.seed,
        **further,
    }
    return pipeline, name, call, settings


SHARD = re.compile(r"(\d+)/(\d+)")


def shard(text: str) -> tuple[int, int]:
    """I/N of --shard, checked."""
    match = SHARD.fullmatch(text)
    index, count = map(int, match.groups()) if match else (0, 0)
    if index >= count:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N-1, such as 0/2")
    return index, count
