"""Attach a method to a pipeline or transformer, detach it, and sum up what it did.

Everything is kept on the object it was given: no global, no patched class. A transformer carries one
`Attachment`; its state is kept apart for each thread, request and guidance branch.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from h2cache.attachment import (
    ATTRIBUTE,
    COMPILED,
    Attachment,
    BlockAttachment,
    check_usable,
    refuse_hooked_caches,
    refuse_other_caches,
)
from h2cache.engines import find_engine, whole_engine
from h2cache.engines.base import class_names
from h2cache.expected import Gap, gaps_of
from h2cache.gate import Gate
from h2cache.h2 import H2Config
from h2cache.memory import Request
from h2cache.method import MethodConfig
from h2cache.modules import check_divisible
from h2cache.parallel import check_together
from h2cache.plan import PlanConfig
from h2cache.records import StepRecord, Summary, summarise
from h2cache.schedule import DENOISERS, Course

_CACHED = "_h2cache_models"  # of a pipeline: weak references to the models that were enabled through it


def enable(
    target: Any,
    config: MethodConfig | None = None,
    *,
    speedup: float | None = None,
    evaluations: int | None = None,
    psnr: float | None = None,
    steps: int | None = None,
    split: int | float | None = None,
) -> Any:
    """Cache the denoiser of `target`, a diffusers pipeline or its transformer or unet; returns `target`.

    speedup, evaluations, psnr: ask for a speed or a quality, and get the plan (`PlanConfig`).
    config: or the settings of another method, by default `H2Config()`, the paper's for FLUX.1-dev.
    steps: the number of steps of a request, for a bare transformer and methods that must know it (of a
    pipeline it is known).
    split: how many blocks are the structure stage, or their share in (0, 1); by default the model's own cut
    into two block lists, or a third of the only list. Enabling again replaces what was enabled before;
    `disable(target)` undoes it. A pipeline with two transformers (Wan 2.2) has both cached.

    Raises TypeError for a config that is none, or a model without an engine where the method needs one (the
    plan does not); ValueError for settings out of range, a transformer that is compiled as a whole where the
    method decides about blocks, that has another cache enabled, or that lacks what the method needs: the step
    count, constants fitted to the checkpoint, a finer cut than the engine offers, a block for each stage.
    """
    if not speedup is evaluations is psnr is None:
        if config is not None:
            raise ValueError(
                f"speedup={speedup}, evaluations={evaluations}, psnr={psnr} are short for a PlanConfig: give "
                f"them or a config, not both ({config})"
            )
        config = PlanConfig(speedup=speedup, evaluations=evaluations, psnr=psnr)
    config = H2Config() if config is None else config
    if not isinstance(config, MethodConfig):
        raise TypeError(
            f"config is a {type(config).__name__}: give a method's settings, such as H2Config(tau1=0.1)"
        )
    denoisers = denoisers_of(target)
    pipeline = target if target is not denoisers[0] else None
    attach = _gate if "whole" in config.requires else _blocks
    attachments = [attach(denoiser, config, pipeline, steps, split) for denoiser in denoisers]
    disable(target)
    if pipeline is not None:
        vars(pipeline)[_CACHED] = [weakref.ref(denoiser) for denoiser in denoisers]
    try:
        for denoiser, attachment in zip(denoisers, attachments, strict=True):
            vars(denoiser)[ATTRIBUTE] = attachment
            attachment.attach()
    except BaseException:
        disable(target)
        raise
    return target


def _gate(
    denoiser: nn.Module, config: MethodConfig, pipeline: Any, steps: int | None, split: int | float | None
) -> Attachment:
    """A method that answers for the whole model."""
    if split is not None:
        raise ValueError(f"split={split!r}: {config.name} answers for the whole model and has no stages")
    refuse_other_caches(denoiser)
    refuse_hooked_caches(denoiser)
    fitted = config.for_checkpoint(checkpoint_name(pipeline) or checkpoint_name(denoiser))
    return Gate(denoiser, whole_engine(denoiser), fitted, pipeline, steps)


def _blocks(
    denoiser: nn.Module, config: MethodConfig, pipeline: Any, steps: int | None, split: int | float | None
) -> Attachment:
    """A method that decides about blocks."""
    if "OptimizedModule" in class_names(denoiser):
        raise ValueError(COMPILED)
    engine = find_engine(denoiser)
    check_usable(denoiser, engine)
    refuse_hooked_caches(denoiser)
    if missing := config.requires - engine.offers:
        raise ValueError(
            f"{config.name} with these settings needs of the model: {', '.join(sorted(missing))}; the "
            f"engine of {engine.name} cannot give that{config.instead}"
        )
    if "modules" in config.requires:
        check_divisible(engine, denoiser)
    check_together(denoiser, engine, config.undivided)
    fitted = config.for_checkpoint(checkpoint_name(pipeline) or checkpoint_name(denoiser))
    if fitted.needs_total_steps and steps is None and pipeline is None:
        raise ValueError(
            f"these settings of {fitted.name} must know the number of steps: enable it on the pipeline, "
            "or pass enable(transformer, config, steps=N)"
        )
    return BlockAttachment(denoiser, engine, fitted, pipeline, steps, split)


def disable(target: Any) -> Any:
    """Put everything back as it was before `enable`; returns `target`. Harmless where none is on.

    Of a pipeline whose transformer was exchanged since, the old one is put back as it was too.
    """
    before = [held() for held in vars(target).pop(_CACHED, ())]
    for denoiser in [*denoisers_of(target), *(model for model in before if model is not None)]:
        for holder in _layers(denoiser):
            attachment = vars(holder).get(ATTRIBUTE)
            if attachment is not None:
                attachment.detach()
                del vars(holder)[ATTRIBUTE]
    return target


def restart(target: Any) -> Any:
    """Compute the next step, and go on without what earlier ones left; returns `target`.

    For a callback or a loop that changes latents or anything else in mid-run which no cache can see. It
    concerns the call under way in this thread. Raises ValueError when no cache is enabled on `target`.
    """
    for attachment in _attachments_of(target):
        attachment.requests.restart()
    return target


def summary(target: Any) -> Summary:
    """What the newest request did: hits, blocks, measures, bytes; `print(summary(pipe))` shows a table.

    Raises ValueError when no cache is enabled on `target`.
    """
    attachments = _attachments_of(target)
    held_now = sum(attachment.requests.bytes_held for attachment in attachments)
    return sum_up(attachments[0].config, _newest_requests(target), held_now)


def sum_up(config: MethodConfig, requests: list[Request], bytes_of_all: int = 0) -> Summary:
    """The summary of the requests of one call: of each denoiser that had a part in it."""
    expected, wanted = _expectation(requests), config.wanted_psnr
    missed = wanted is not None and min(expected.get("expected_psnr", [wanted])) < wanted
    short = [f"asked for {wanted:g} dB, which is not expected to be reached"] if missed else []
    return summarise(
        config.name,
        records_of(requests),
        max(request.most_bytes_held for request in requests),  # of two transformers one after the other
        sum(request.bytes_needed for request in requests),
        requests[0].reason,
        reuses=config.reuses,
        bytes_of_all=bytes_of_all,
        notes=tuple(dict.fromkeys([*(note for request in requests for note in request.notes), *short])),
        **expected,
    )


def _expectation(requests: list[Request]) -> dict[str, Any]:
    """The fidelity of each picture of a pipeline call, as its gaps let one expect."""
    estimate, pictures = requests[0].estimate, _gaps(requests)  # a wait, when somebody asks
    if estimate is None or not all(math.isfinite(gap.error) for gaps in pictures for gap in gaps):
        return {}
    expected = tuple(map(estimate.psnr, pictures))
    return {"expected_psnr": expected, "expected_error": estimate.error} if expected else {}


def _gaps(requests: list[Request]) -> list[tuple[Gap, ...]]:
    """The gaps of each picture of a pipeline call, in its first guidance branch."""
    known = [one for request in requests for one in request.seen]
    own = [(step, seen) for branch, step, seen in known if branch == known[0][0]]
    return gaps_of([(step, seen) for step, seen in own if len(seen.change) == len(own[0][1].change)])


def last_gaps(target: Any) -> tuple[Gap, ...]:
    """The gaps between evaluations of the newest picture, the first of a batch; empty: none was seen."""
    return next(iter(_gaps(_newest_requests(target))), ())


def last_course(target: Any) -> Course:
    """The noise levels of the newest pipeline call; ValueError if none ran under a scheduler."""
    course = _newest_requests(target)[0].course
    if course is None:
        raise ValueError("no pipeline call has run yet, or its scheduler is not known")
    return course


def step_records(target: Any) -> list[StepRecord]:
    """The `StepRecord`s of the newest request, in the order of execution.

    The steps of a second transformer are numbered on from those of the first.
    """
    return records_of(_newest_requests(target))


def records_of(requests: list[Request]) -> list[StepRecord]:
    """The records of `requests`, one after the other, with what was left on the device; a wait."""
    records: list[StepRecord] = []
    for request in requests:
        done = 1 + max((r.step for r in records), default=-1)
        records += [
            replace(
                r,
                step=r.step + done,
                timestep=float(r.timestep),
                measure=None if r.measure is None else float(r.measure),  # what was left on the device
            )
            for r in request.records
        ]
    return records


def checkpoint_name(loaded: Any) -> str | None:
    """Last part of the folder or hub id that a pipeline or transformer was loaded from; None if new."""
    config = getattr(loaded, "config", None)
    path = config.get("_name_or_path") if isinstance(config, Mapping) else None
    parts = [part for part in re.split(r"[/\\]", path or "") if part not in ("", *DENOISERS)]
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]  # the hub's cache
    return (cached or parts or [None])[-1]


def denoisers_of(target: Any) -> list[nn.Module]:
    """The transformers or the unet of a pipeline; of a model that is given itself, that. TypeError: none."""
    if isinstance(target, nn.Module) or "OptimizedModule" in class_names(target):
        return [target]
    parts = [getattr(target, name, None) for name in DENOISERS]
    found = [part for part in parts if isinstance(part, nn.Module)]
    if not found:
        raise TypeError(
            f"{type(target).__name__} is no model and no pipeline with one (it has none of "
            f"{', '.join(DENOISERS)})"
        )
    return found


def _layers(denoiser: nn.Module) -> list[nn.Module]:
    """`denoiser`, and what torch.compile has wrapped in it, perhaps after a method was enabled on that."""
    inner = getattr(denoiser, "_orig_mod", None)
    return [denoiser] if inner is None else [denoiser, inner]


def _attachments_of(target: Any) -> list[Attachment]:
    found = [
        next(filter(None, (vars(holder).get(ATTRIBUTE) for holder in _layers(denoiser))), None)
        for denoiser in denoisers_of(target)
    ]
    known = [attachment for attachment in found if attachment is not None]
    if len(known) < len(found):
        now = "any more, for the pipeline has another model" if _CACHED in vars(target) else "here"
        raise ValueError(f"no cache is enabled {now}: call h2cache.enable(pipe) first")
    return known


def _newest_requests(target: Any) -> list[Request]:
    """The requests of the newest pipeline call: one for each transformer that had a part in it."""
    requests = [attachment.requests.newest for attachment in _attachments_of(target)]
    newest = max(requests, key=lambda request: request.began)
    token = newest.schedule and newest.schedule.token
    if token is None:
        return [newest]
    return [r for r in requests if r.schedule is not None and r.schedule.token is token]
