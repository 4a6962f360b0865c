"""The best steps of a plan for a wanted speed, found by measuring (thresholds of methods: `thresholds.py`).

The search looks at the true loss: the PSNR of finished pictures against the uncached ones, on a few prompts.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from h2cache.api import checkpoint_name, denoisers_of, disable, last_course, last_gaps
from h2cache.expected import Gap, Sample, fit, usual_gaps
from h2cache.grid import default_steps
from h2cache.machine import device_name
from h2cache.plan import PlanConfig
from h2cache.registry import find_method
from h2cache.schedule import Course
from h2cache.studio import SET_HERE, Prompt, Share, Studio, prompts_of
from h2cache.thresholds import Found, tune_thresholds
from h2cache.tuned import Quality, Tuned, TunedPlan, user_folder

GAIN = 0.02  # dB that a move must bring to be kept
HOPELESS = 1.5  # dB behind the best on the prompts so far: the rest of them is not drawn
TRUSTS = (None, 1.0, 0.0)  # in the line of a plan: measured, in full, none


def tune(
    pipe: Any,
    prompts: Iterable[Prompt],
    *,
    speedups: float | Iterable[float] = (2, 3, 4, 5, 6, 8),
    held_out: Iterable[Prompt] = (),
    method: str = "plan",
    speedup: float | None = None,
    trials: int | None = None,
    seed: int = 0,
    save: str | Path | None = None,
    progress: bool = True,
    group: Any = None,
    **call: Any,
) -> Tuned | Found:
    """Find what gives the best pictures at a speed, by drawing `prompts` again and again.

    prompts: two to eight are enough; a text each, or a dictionary of the pipeline's arguments (and "seed").
    held_out: other prompts, on which the result is measured too. method="plan": the evaluated steps for each
    of `speedups`; the result is kept in the user's cache folder (or `save`), where
    `enable(pipe, speedup=5)` and `enable(pipe, psnr=40)` find it, and a search that was stopped goes on
    there. Plans that this file has for other speeds are kept, if they are of the same model, sampler, noise
    levels, size and arguments of the call. trials: the most plans that are tried for a speed; None: until no
    move gains. Another method: its thresholds for `speedup`, returned as a `Found`. group: a
    torch.distributed process group that shares the prompts; every process of it makes this same call, each
    with a pipeline of its own, and the first one writes. call: arguments of every call, such as
    num_inference_steps, height and width.

    Raises ValueError without a prompt, for one that is neither text nor dictionary, or that holds what all
    have in common (steps) or what is set here (generator, output_type); for a speed below 1, for none above 1
    or a `speedup` with the plan; for fewer than one trial; where the file is a folder, or no file of tuned
    plans; where an uncached picture, or one of a plan that was found, is not finite. TypeError for anything
    but a pipeline. ConnectionError if another process of the group has ended. Ctrl-C ends the search and
    keeps the best.
    """
    asked, held, speeds = prompts_of("prompts", prompts), prompts_of("held_out", held_out), _speeds(speedups)
    _check(pipe, asked, method, speeds, speedup, trials, call)
    share = Share(group)
    progress = progress and share.is_first
    try:
        if method != "plan":
            if speedup is None:
                raise ValueError(f"method={method!r} needs a wanted speed, as in speedup=4")
            studio = Studio(pipe, asked, call, seed, share)
            return tune_thresholds(studio, find_method(method), speedup, progress)
        return _tune_plan(pipe, asked, held, speeds, trials, seed, save, progress, share, call)
    finally:
        disable(pipe)


def _speeds(given: float | Iterable[float]) -> tuple[float, ...]:
    return tuple(given) if isinstance(given, Iterable) else (given,)


def _check(
    pipe: Any,
    prompts: Sequence[Prompt],
    method: str,
    speeds: tuple[float, ...],
    speedup: float | None,
    trials: int | None,
    call: dict[str, Any],
) -> None:
    """Refuse what `tune` cannot work with."""
    if denoisers_of(pipe)[0] is pipe or not callable(pipe):
        raise TypeError(f"{type(pipe).__name__} draws no pictures from prompts: give tune the whole pipeline")
    if not prompts:
        raise ValueError("prompts is empty: two to eight are needed")
    if trials is not None and trials < 1:
        raise ValueError(f"trials={trials}: at least one plan must be tried, or None for as many as it takes")
    wanted = speeds if speedup is None else (*speeds, speedup)
    if low := [s for s in wanted if not isinstance(s, Real) or not 1.0 <= s < 1000.0]:
        raise ValueError(
            f"speedup {low[0]!r} is out of range [1, 1000): it says how many times fewer evaluations"
        )
    if method == "plan" and speedup is not None:
        raise ValueError(f"speedup={speedup} is for other methods: for the plan say speedups=({speedup},)")
    if method == "plan" and not any(s > 1 for s in speeds):
        raise ValueError(f"speedups={speeds}: nothing is left to tune, give some above 1, as in (2, 4)")
    for key, why in SET_HERE.items():
        if key in call:
            raise ValueError(f"{key}={call[key]!r:.60} cannot be given: {why}")


def _tune_plan(
    pipe: Any,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    speedups: Sequence[float],
    trials: int | None,
    seed: int,
    save: str | Path | None,
    progress: bool,
    share: Share,
    call: dict[str, Any],
) -> Tuned:
    before = None if save is None else _read(Path(save), share)
    studio = Studio(pipe, prompts, call, seed, share)
    others = Studio(pipe, held_out, call, seed + len(prompts), share, "held_out")
    model = checkpoint_name(pipe) or checkpoint_name(denoisers_of(pipe)[0])
    if not model and save is None:
        raise ValueError("the pipeline was loaded from no folder or hub id: say where to keep it, save=FILE")
    size = "x".join(map(str, studio.draw(0, PlanConfig(speedup=1.0, file="none")).shape[:-1]))
    course = last_course(pipe)
    tuned = Tuned(model or "", course.sampler, course.levels, (), None, size)
    path = user_folder() / tuned.file_name if save is None else Path(save)
    before = _read(path, share) if save is None else before
    earlier = before if before is not None and _is_same(before, tuned, course, call) else None
    dtype = getattr(pipe, "dtype", None)
    log = _Log(path, f"{model}{dtype}{_in_words([list(prompts), call])}{seed}{course}", share)
    plans: list[TunedPlan] = []
    samples: list[Sample] = []  # of each plan
    counts = sorted({max(2, round(course.steps / s)) for s in speedups if s > 1})
    bar = tqdm(total=len(counts), disable=not progress, unit="speed")
    try:
        for count in counts:
            # From either it does not find to the other: the last step evaluated, or standing in.
            starts = sorted({default_steps(course, count, to_end) for to_end in (False, True)})
            if trials is not None and trials < 2 * len(TRUSTS):
                starts = starts[:1]
            left = math.inf if trials is None else trials // len(starts)
            searches = [_Search(studio, course, log, bar, left) for _ in starts]
            tried = [s.better(s.best_trust(start)) for s, start in zip(searches, starts, strict=True)]
            config, _ = max(tried, key=lambda found: found[1])
            values, gaps = _measure(studio, config)
            seen, held = Quality.of(values), None
            if held_out:
                values, gaps = _measure(others, config)
                held = Quality.of(values)
            usual = _usual_between(config.steps, gaps)
            seen_gaps = tuple(g.change for g in usual), tuple(g.error for g in usual)
            plans.append(TunedPlan(config.steps, seen, held, config.trust, *seen_gaps))
            samples.append(Sample(count, course.steps, gaps, values))
            bar.update()
            made = _made(pipe, prompts, held_out, call)
            estimate, weights = fit(samples)
            known = (replace(plan, weights=own) for plan, own in zip(plans, weights, strict=True))
            found = replace(tuned, plans=tuple(known), estimate=estimate, made=made)
            tuned = _joined(found, earlier)
            log.save(tuned)
    except KeyboardInterrupt:
        if share.is_first:
            tqdm.write(f"stopped: {len(plans)} of {len(counts)} speeds are tuned; the same call goes on")
        if not plans:
            raise
    else:
        log.done()
    finally:
        bar.close()
    return tuned


def _read(path: Path, share: Share) -> Tuned | None:
    """The tuned plans at `path`, as the first process has them. ValueError if none can be written there."""
    found: Tuned | ValueError | None = None
    if share.is_first:
        try:
            found = _at(path)
        except ValueError as error:
            found = error
    found = share.all(found)[0]  # all of them go on, or none does
    if isinstance(found, ValueError):
        raise found
    return found


def _at(path: Path) -> Tuned | None:
    if path.is_dir():
        raise ValueError(f"save={str(path)!r} is a folder: give a file in it, as in {path / 'plans.json'}")
    if file := next((str(part) for part in path.parents if part.is_file()), None):
        raise ValueError(f"save={str(path)!r}: {file} is a file, not a folder: give another place")
    if not path.exists():
        return None
    try:
        return Tuned.load(path)
    except ValueError as error:
        raise ValueError(
            f"{error}. It is not written over: move it away, or give another save=FILE"
        ) from None


def _is_same(old: Tuned, new: Tuned, course: Course, call: dict[str, Any]) -> bool:
    """Whether the plans of both may stand in one file."""
    names = [(t.model, t.sampler, t.size) for t in (old, new)]
    return names[0] == names[1] and old.fits(course) and old.made.get("call") == _plain(call)


def _joined(new: Tuned, old: Tuned | None) -> Tuned:
    """`new`, and the plans of `old` with other numbers of evaluations.

    The estimate is that of the search which found more of the plans, if it learnt what gaps mean.
    """
    kept = [] if old is None else [plan for plan in old.plans if new.plan(plan.evaluations) is None]
    if old is None or not kept:
        return new
    plans = sorted([*new.plans, *kept], key=lambda plan: plan.evaluations)
    both = [new.estimate, old.estimate] if len(new.plans) >= len(kept) else [old.estimate, new.estimate]
    known = [estimate for estimate in both if estimate is not None]
    estimate = max(known, key=lambda e: e.weighted_error > 0, default=None)
    return replace(new, plans=tuple(plans), estimate=estimate)


@dataclass
class _Search:
    """A local search among the plans with one number of evaluations."""

    studio: Studio
    course: Course
    log: _Log
    bar: tqdm
    trials: float  # that are left
    best: PlanConfig | None = None

    def loss(self, plan: PlanConfig) -> float:
        """Mean PSNR; -inf as soon as that of the best plan is out of reach.

        Processes draw a prompt each at a time, and look at them one after the other as a single one would.
        """
        self.trials -= 1
        known, best = self.log.values(plan), self.log.values(self.best) if self.best else {}
        count, behind = len(self.studio.prompts), 0.0
        for number in range(count):
            if number not in known:
                next_ones = range(number, min(number + self.studio.share.size, count))
                missing = [n for n in next_ones if n not in known]
                found = self.studio.share.each(missing, lambda n: max(0.0, self.studio.fidelity(n, plan)))
                self.log.note(plan, found)
            behind += best[number] - known[number] if best else 0.0
            if number + 1 < count and behind / (number + 1) > HOPELESS:
                return -math.inf
        return math.fsum(known.values()) / count

    def best_trust(self, steps: tuple[int, ...]) -> PlanConfig:
        """The best plan with these steps."""
        plans = [PlanConfig(steps=steps, trust=trust) for trust in TRUSTS]
        return max(plans if self.trials > len(plans) else plans[:1], key=self.loss)

    def better(self, start: PlanConfig) -> tuple[PlanConfig, float]:
        """Move each evaluated step by one or two as long as the mean gains; the plan, and its mean."""
        self.best, value, moved = start, self.loss(start), True
        while moved:
            moved = False
            for place in range(1, len(start.steps)):
                for change in (-1, 1, -2, 2):
                    steps = list(self.best.steps)
                    if steps[place] in self.course.starts:
                        continue
                    steps[place] += change
                    limit = steps[place + 1] if place + 1 < len(steps) else self.course.steps
                    if not steps[place - 1] < steps[place] < limit:
                        continue
                    plan = replace(start, steps=tuple(steps))
                    if self.trials <= 0:
                        return self.best, value
                    if (tried := self.loss(plan)) > value + GAIN:
                        self.best, value, moved = plan, tried, True
                    self.bar.set_postfix_str(f"{len(steps)} evaluations: {value:.2f} dB")
        return self.best, value


def _measure(studio: Studio, config: PlanConfig) -> tuple[list[float], list[tuple[Gap, ...]]]:
    """A plan on some prompts: PSNR of 8-bit pictures, and the gaps that each run has seen."""

    def one(number: int) -> tuple[float, tuple[Gap, ...]]:
        value = studio.fidelity(number, config, saved=True)
        if value == -math.inf:
            raise studio.unfit(number, f"the cached picture, with evaluations at {config.steps},")
        return value, last_gaps(studio.pipe)

    values, gaps = zip(*studio.measured(one), strict=True)
    return list(values), list(gaps)


def _usual_between(steps: tuple[int, ...], pictures: Sequence[Sequence[Gap]]) -> tuple[Gap, ...]:
    """What is usual between each two of the steps; 0 where no run saw it: a second denoiser begins there."""
    known = {(gap.start, gap.end): gap for gap in usual_gaps(pictures)}
    return tuple(known.get(ends) or Gap(*ends, 0.0, 0.0) for ends in pairwise(steps)) if known else ()


def _plain(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call that a file can hold."""
    return {k: v for k, v in call.items() if isinstance(v, (int, float, str))}


def _made(
    pipe: Any, prompts: Sequence[Prompt], held_out: Sequence[Prompt], call: dict[str, Any]
) -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": device_name(getattr(pipe, "_execution_device", "cpu")),
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "prompts": len(prompts),
        "held_out": len(held_out),
        "call": _plain(call),
    }


_Key = tuple[tuple[int, ...], float | None]  # evaluated steps, trust


def _in_words(given: Any) -> str:
    """`given` as text that is the same in every process: pictures and tensors by what is in them."""
    if isinstance(given, dict):
        return f"{{{', '.join(f'{key}: {_in_words(given[key])}' for key in sorted(given))}}}"
    if isinstance(given, (list, tuple)):
        return f"[{', '.join(map(_in_words, given))}]"
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu().float().numpy()
    if isinstance(given, np.ndarray) or hasattr(given, "__array_interface__"):
        pixels = np.asarray(given)
        return f"{pixels.shape} {hashlib.sha256(pixels.tobytes()).hexdigest()}"
    return repr(given)


class _Log:
    """What was measured so far, on disk: a search that was stopped goes on. `task` says what it is about.

    The first process reads and writes it for all.
    """

    def __init__(self, path: Path, task: str, share: Share) -> None:
        self.path, self._writes = path, share.is_first
        key = hashlib.sha256(task.encode()).hexdigest()[:12]
        self.part = path.with_name(f".{path.stem}-{key}.jsonl")
        self.known: dict[_Key, dict[int, float]] = {}
        if self._writes and self.part.is_file():
            for line in self.part.read_text(encoding="utf-8").splitlines():
                try:
                    steps, trust, number, value = json.loads(line)
                except ValueError:
                    continue  # the last line of a killed run
                self.known.setdefault((tuple(steps), trust), {})[number] = value
        self.known = share.all(self.known)[0]

    def values(self, plan: PlanConfig) -> dict[int, float]:
        return self.known.setdefault((plan.steps, plan.trust), {})

    def note(self, plan: PlanConfig, found: dict[int, float]) -> None:
        self.values(plan).update(found)
        if self._writes:
            self.part.parent.mkdir(parents=True, exist_ok=True)
            with self.part.open("a", encoding="utf-8") as file:
                for number, value in found.items():
                    file.write(json.dumps([plan.steps, plan.trust, number, value]) + "\n")

    def save(self, tuned: Tuned) -> None:
        if self._writes:
            tuned.save(self.path)

    def done(self) -> None:
        if self._writes:
            self.part.unlink(missing_ok=True)
