"""Random sequences of calls leave nothing behind: every picture is that of a fresh pipeline, bit for bit.

In the suite a few; for longer:

    H2CACHE_SEQUENCES=1000 python -m pytest -n 0 tests/library/test_sequences.py
"""

import os
import random
import threading
from dataclasses import dataclass, replace
from functools import cache, partial

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

import h2cache
from h2cache import H2Config, find_method
from h2cache.plan import PlanConfig
from tests.helpers.inside import tensors_alive
from tests.helpers.toys import make_flux

SEQUENCES = int(os.environ.get("H2CACHE_SEQUENCES", "14"))
INF = float("inf")
SETTINGS = {  # None: uncached
    "uncached": None,
    "h2cache": H2Config(tau1=0.05, tau2=0.05),
    "h2cache loose": H2Config(tau1=INF, tau2=INF, max_consecutive_hits=2),
    "taylor": H2Config(tau1=INF, tau2=0.1, predictor="taylor"),
    "plan": PlanConfig(speedup=2, file="none"),
    "plan of 3": PlanConfig(evaluations=3, file="none"),
    "block_cache": find_method("block_cache")(threshold=0.1),
    "teacache": replace(find_method("teacache")(), threshold=0.5, coefficients=(0.0, 0.0, 0.0, 1.0, 0.0)),
    "magcache": replace(find_method("magcache")(), ratios=(1.0, 0.98, 0.97), retention=0.1),
    "taylorseer": find_method("taylorseer")(warmup_steps=1, interval=2),
    "taylorseer_lite": find_method("taylorseer_lite")(warmup_steps=1, interval=3),
    "hicache": find_method("hicache")(warmup_steps=1),
    "speca": find_method("speca")(warmup_steps=1),
    "clusca": find_method("clusca")(warmup_steps=1),
}


@dataclass(frozen=True)
class Picture:
    """What a call asks for."""

    setting: str
    prompt: int
    steps: int
    side: int
    batch: int


class Stopped(Exception):
    pass


def fresh(model=None) -> FluxPipeline:
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    made = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model or make_flux(), **parts
    )
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: FluxPipeline, asked: Picture, stop_at: int | None = None, at_step=None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(asked.prompt)

    def after(pipe, step, timestep, kwargs):
        if step == stop_at:
            raise Stopped
        if at_step is not None and step == 1:
            at_step()
        return kwargs

    return pipe(
        prompt_embeds=torch.randn(asked.batch, 5, 12, generator=generator),
        pooled_prompt_embeds=torch.randn(asked.batch, 10, generator=generator),
        height=asked.side, width=asked.side, num_inference_steps=asked.steps, output_type="latent",
        generator=[torch.Generator().manual_seed(n) for n in range(asked.batch)],
        callback_on_step_end=after,
    ).images  # fmt: skip


@cache
def expected(asked: Picture) -> torch.Tensor:
    pipe, config = fresh(), SETTINGS[asked.setting]
    return draw(pipe if config is None else h2cache.enable(pipe, config), asked)


def random_picture(rng: random.Random, setting: str) -> Picture:
    steps, side, batch = rng.choice([1, 2, 5, 8]), rng.choice([16, 32]), rng.choice([1, 1, 2])
    return Picture(setting, rng.randrange(2), steps, side, batch)


def set_to(pipe: FluxPipeline, setting: str) -> None:
    config = SETTINGS[setting]
    h2cache.disable(pipe) if config is None else h2cache.enable(pipe, config)


def bare_calls(model, rng: random.Random) -> None:
    """Somebody's own loop over the transformer."""
    ids, generator = torch.zeros(4, 3), torch.Generator().manual_seed(rng.randrange(3))
    for n in range(rng.randrange(1, 4)):
        with torch.no_grad():
            model(
                torch.randn(1, 4, 8, generator=generator), torch.randn(1, 5, 12, generator=generator),
                torch.randn(1, 10, generator=generator), torch.tensor([1 - n / 4]), ids, torch.zeros(5, 3),
                torch.tensor([3.5]),
            )  # fmt: skip


@pytest.mark.parametrize("seed", range(SEQUENCES))
def test_every_picture_is_that_of_a_fresh_pipeline(seed):
    rng = random.Random(seed)
    first = fresh()
    pipes = [first, fresh(first.transformer), fresh()]  # the second shares the first's transformer
    on = ["uncached", "uncached", "uncached"]
    for _ in range(rng.randrange(3, 8)):
        which = rng.randrange(3)
        pipe, asked = pipes[which], random_picture(rng, on[which])
        action = rng.choice(["enable", "draw", "draw", "draw", "disable", "interrupt", "bare", "switch"])
        setting = rng.choice(list(SETTINGS))
        if action == "enable":
            set_to(pipe, setting)
            on[which] = setting
        elif action == "switch":  # in mid-run
            draw(pipe, replace(asked, steps=5), at_step=partial(set_to, pipe, setting))
            on[which] = setting
        elif action == "disable":
            h2cache.disable(pipe)
            on[which] = "uncached"
        elif action == "interrupt":
            with pytest.raises(Stopped):
                draw(pipe, asked, stop_at=rng.randrange(asked.steps))
        elif action == "bare" and SETTINGS[on[which]] is None:
            bare_calls(pipe.transformer, rng)
        else:
            assert torch.equal(draw(pipe, asked), expected(asked)), asked
        if which < 2:  # one transformer
            on[0] = on[1] = on[which]
    for pipe in pipes:
        h2cache.disable(pipe)
        asked = random_picture(rng, "uncached")
        assert torch.equal(draw(pipe, asked), expected(asked)), asked


def test_many_threads_keep_memory_flat():
    """24 threads, 72 requests on one transformer: each draws what it draws alone, and nothing is kept."""
    pipe = fresh()
    h2cache.enable(pipe, SETTINGS["h2cache loose"])
    asked = [Picture("h2cache loose", n % 2, 5, 16, 1) for n in range(12)]
    right, wrong = [expected(one) for one in asked[:2]], []

    def work(number: int) -> None:
        own = fresh(pipe.transformer)
        drawn = (draw(own, asked[number]) for _ in range(3))
        wrong.extend(number for latents in drawn if not torch.equal(latents, right[number % 2]))

    kept = []
    for _ in range(2):  # 12 threads at a time
        threads = [threading.Thread(target=work, args=(n,)) for n in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        kept.append(len(tensors_alive()))
    assert not wrong
    assert h2cache.summary(pipe).bytes_of_all == 0
    assert kept[1] <= kept[0]
