"""Finding settings by measuring: the best steps of a plan, or the thresholds of a method, for a wanted speed.

The search looks at the true loss: the PSNR of finished pictures against the uncached ones, on a few prompts.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from h2cache.api import checkpoint_name, denoisers_of, disable, enable, last_course, last_gaps, summary
from h2cache.expected import Gap, Sample, fit, usual_gaps
from h2cache.grid import default_steps
from h2cache.h2 import H2Config
from h2cache.machine import device_name
from h2cache.method import MethodConfig
from h2cache.plan import PlanConfig
from h2cache.registry import find_method
from h2cache.schedule import Course
from h2cache.tuned import Quality, Tuned, TunedPlan, user_folder

GAIN = 0.02  # dB that a move must bring to be kept
HOPELESS = 1.5  # dB behind the best on the prompts so far: the rest of them is not drawn
CLOSE = 0.03  # share by which a found threshold may miss the wanted speed
TRUSTS = (None, 1.0, 0.0)  # in the line of a plan: measured, in full, none
RATIOS = (0.5, 1.0, 2.0, 4.0, 8.0)  # tau1 / tau2 that are tried
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
    asked, held, speeds = _asked("prompts", prompts), _asked("held_out", held_out), _speeds(speedups)
    _check(pipe, asked, method, speeds, speedup, trials, call)
    share = Share(group)
    progress = progress and share.is_first
    try:
        if method != "plan":
            if speedup is None:
                raise ValueError(f"method={method!r} needs a wanted speed, as in speedup=4")
            studio = Studio(pipe, asked, call, seed, share)
            return _tune_thresholds(studio, find_method(method), speedup, progress)
        return _tune_plan(pipe, asked, held, speeds, trials, seed, save, progress, share, call)
    finally:
        disable(pipe)


def _asked(name: str, given: Iterable[Prompt] | None) -> list[Prompt]:
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


# The plan.


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


# Thresholds.


@dataclass(frozen=True)
class Found:
    """The settings of a method that give a wanted speed."""

    config: MethodConfig
    speedup: float  # measured: times fewer executed blocks, mean over the prompts
    quality: Quality


def _tune_thresholds(studio: Studio, kind: type[MethodConfig], speedup: float, progress: bool) -> Found:
    names = {f.name for f in fields(kind)}
    shapes: list[Callable[[float], dict[str, Any]]]
    if kind is H2Config:
        shapes = [partial(_taus, math.sqrt(ratio)) for ratio in RATIOS]
    elif "threshold" in names:
        shapes = [lambda x: {"threshold": x}]
    elif "interval" in names:
        shapes = [lambda x: {"interval": max(1, round(x * 10))}]
    else:
        raise ValueError(f"{kind.name} has neither thresholds nor an interval to tune")
    bar = tqdm(total=len(shapes), disable=not progress, unit="shape")
    found: list[Found] = []
    try:
        for shape in shapes:
            found.append(_at_speed(studio, kind, shape, speedup))
            best = _best(found, speedup)
            bar.set_postfix_str(f"{best.speedup:.2f}x, {best.quality.mean:.2f} dB")
            bar.update()
    except KeyboardInterrupt:
        if not found:
            raise
    finally:
        bar.close()
    return _best(found, speedup)


def _taus(root: float, x: float) -> dict[str, Any]:
    return {"tau1": x * root, "tau2": x / root}


def _at_speed(
    studio: Studio, kind: type[MethodConfig], shape: Callable[[float], dict[str, Any]], speedup: float
) -> Found:
    """Bisection for the scale of `shape`, settings of `kind`, that gives the speed."""
    low, high, tried = 1e-3, 4.0, []
    for _ in range(12):
        middle = math.sqrt(low * high)
        tried.append(_speed_and_quality(studio, kind(**shape(middle))))
        if abs(tried[-1].speedup / speedup - 1) < CLOSE:
            break
        low, high = (middle, high) if tried[-1].speedup < speedup else (low, middle)
    return min(tried, key=lambda f: abs(f.speedup / speedup - 1))


def _speed_and_quality(studio: Studio, config: MethodConfig) -> Found:
    def one(number: int) -> tuple[float, float]:
        return max(0.0, studio.fidelity(number, config, saved=True)), summary(studio.pipe).block_ratio

    values, ratios = zip(*studio.measured(one), strict=True)
    return Found(config, math.fsum(ratios) / len(ratios), Quality.of(values))


def _best(found: Sequence[Found], speedup: float) -> Found:
    """The best pictures among those that are near the speed; else the nearest speed."""
    near = [f for f in found if f.speedup >= speedup * (1 - 2 * CLOSE)]
    return max(near, key=lambda f: f.quality.mean) if near else max(found, key=lambda f: f.speedup)
