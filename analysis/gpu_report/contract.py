"""Behaviour that could differ on a GPU: branches, batches, sizes, threads, errors; small, in float32."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import h2cache
from analysis.gpu_report.context import Context, goal
from analysis.gpu_report.models import Loop, build, inputs_of, sample_of, settings
from h2cache import H2Config, MethodConfig

STEPS = 6
TOLERANCE = 1e-4
CONFIGS: dict[str, MethodConfig] = {
    "h2cache": H2Config(tau1=0.2, tau2=0.3, max_consecutive_hits=1),
    "plan": settings("plan", speedup=2.0, file="none"),
}


def contract(ctx: Context) -> Iterator[dict]:
    """Every check with the paper's rule and the plan."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    wrong, done = [], 0
    try:
        for method, config in CONFIGS.items():
            for check in CHECKS:
                row = {"method": method, "what": (check.__doc__ or "").strip()}
                loop = Loop(build(3, 4, True, ctx.device, torch.float32))
                try:
                    row["difference"] = f"{check(loop, config):.2e}"
                    row["holds"] = float(row["difference"]) <= TOLERANCE
                except Exception as error:
                    row |= {"holds": False, "error": f"{type(error).__name__}: {error}"[:300]}
                done += 1
                if not row["holds"]:
                    wrong.append(f"{method}: {row['what']}")
                yield row
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    yield goal("behaviour that does not hold", len(wrong), 0, "", "; ".join(wrong) or f"{done} checks")


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def branches(loop: Loop, config: MethodConfig) -> float:
    """two guidance branches with one text are one branch"""
    inputs = inputs_of(loop.transformer, 64, 16)
    text = inputs["encoder_hidden_states"]
    h2cache.enable(loop, config)
    alone = loop(inputs, STEPS)[-1]
    both = loop(inputs, STEPS, texts=(text, text.clone()))[-1]
    assert len(h2cache.summary(loop).branches) == 2
    return apart(both, alone)


def batch(loop: Loop, config: MethodConfig) -> float:
    """each picture of a batch of four is the one drawn alone"""
    inputs = inputs_of(loop.transformer, 64, 16, batch=4)
    h2cache.enable(loop, config)
    together = loop(inputs, STEPS)[-1]
    return max(apart(together[n : n + 1], loop(sample_of(inputs, n), STEPS)[-1]) for n in range(4))


def sizes(loop: Loop, config: MethodConfig) -> float:
    """after another size, a picture is as before"""
    inputs, other = (inputs_of(loop.transformer, n, 16) for n in (64, 144))
    h2cache.enable(loop, config)
    first = loop(inputs, STEPS)[-1]
    loop(other, STEPS)
    return apart(loop(inputs, STEPS)[-1], first)


def threads(loop: Loop, config: MethodConfig) -> float:
    """two threads on one transformer draw what each draws alone"""
    given = [inputs_of(loop.transformer, 64, 16, seed=n) for n in range(2)]
    h2cache.enable(loop.transformer, config, steps=STEPS)
    loops = [Loop(loop.transformer) for _ in given]
    right = [own(inputs, STEPS)[-1] for own, inputs in zip(loops, given, strict=True)]
    found: dict[int, Tensor] = {}

    def work(n: int) -> None:
        for _ in range(3):
            found[n] = loops[n](given[n], STEPS)[-1]

    started = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return max(apart(found[n], right[n]) for n in range(2))


def broken_off(loop: Loop, config: MethodConfig) -> float:
    """after an error in mid-run, a picture is as before"""
    inputs = inputs_of(loop.transformer, 64, 16)
    h2cache.enable(loop, config)
    first = loop(inputs, STEPS)[-1]

    def stop(*_: object) -> None:
        raise RuntimeError("stopped")

    hook = loop.transformer.proj_out.register_forward_pre_hook(stop)
    try:
        loop(inputs, STEPS)
    except RuntimeError:
        pass
    else:
        raise AssertionError("the hook did not run")
    finally:
        hook.remove()
    return apart(loop(inputs, STEPS)[-1], first)


CHECKS: tuple[Callable[[Loop, MethodConfig], float], ...] = (branches, batch, sizes, threads, broken_off)
