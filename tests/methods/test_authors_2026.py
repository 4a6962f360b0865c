"""Decisions and stand-ins of the methods of 2026 against their authors' code, on one small sampler.

    H2CACHE_AUTHORS=FOLDER python -m pytest tests/methods/test_authors_2026.py

FOLDER holds checkouts named EasyCache (H-EmbodVis), MeanCache (UnicomAI), Spectrum (hanjq17), BudCache
(Westlake-AGI-Lab), DiCache (Bujiazi) and SenCache (vita-epfl). Only single functions of them are run, with a
network of a few lines in the place of the model. SeaCache's is part of diffusers. Skipped without them.
"""

import __future__

import ast
import importlib.util
import math
import os
import random
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from h2cache.baselines.budcache import BudCacheConfig, neighbours, proposal
from h2cache.baselines.dicache import DiCacheConfig
from h2cache.baselines.easycache import EasyCacheConfig
from h2cache.baselines.meancache import MeanCacheConfig
from h2cache.baselines.seacache import SeaCacheConfig
from h2cache.baselines.sencache import SenCacheConfig
from h2cache.baselines.spectrum import Fit, SpectrumConfig

from h2cache.memory import Memory, Request
from h2cache.program import Forward, Latents, Ran, Run, Skip, Stage, Stand, Stream
from h2cache.schedule import Course

AUTHORS = Path(os.environ.get("H2CACHE_AUTHORS", "/nowhere"))
STEPS, DEPTH, TOKENS, WIDTH = 50, 6, 24, 8
LEVELS = [1 - n / STEPS for n in range(STEPS + 1)]


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (AUTHORS / name).is_dir(), reason=f"H2CACHE_AUTHORS has no {name}")


def function(path: Path, name: str, **given):
    """A function of the authors' file, run with the names in `given` beside torch, numpy and random."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (node,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    flags = __future__.annotations.compiler_flag
    names = {"torch": torch, "np": np, "random": random, "math": math, "F": torch.nn.functional} | given
    exec(compile(ast.Module([node], []), str(path), "exec", flags, True), names)
    return names[name]


class Network:
    """Blocks that add something smooth to their tokens (1, TOKENS, WIDTH); counts what runs."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.maps = [torch.randn(WIDTH, WIDTH, generator=g) * 0.6 for _ in range(DEPTH)]
        self.runs: list[int] = []  # steps at which the last block ran

    def blocks(self, step):
        return [lambda h, *_, n=n, **__: self.block(n, h, step()) for n in range(DEPTH)]

    def block(self, n: int, h: torch.Tensor, step: int) -> torch.Tensor:
        if n == DEPTH - 1:
            self.runs.append(step)
        return h + 0.3 * torch.tanh(h @ self.maps[n])


def noise() -> torch.Tensor:
    return torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def ours(config) -> tuple[list[int], list[torch.Tensor]]:
    """Computed steps of a method under an Euler sampler, and the samples before each step and at the end."""
    network, now = Network(), [0]
    blocks, method = network.blocks(lambda: now[0]), config.build()
    request = Request(None, STEPS, "")
    request.course = Course(tuple(LEVELS), tuple(b - a for a, b in pairwise(LEVELS)), (0,))
    memory = Memory(request, "cond", 1)
    stages = () if "whole" in config.requires else (Stage("a", 0, 2, False), Stage("b", 2, DEPTH, False))
    xs = [noise()]
    for n in range(STEPS):
        now[0], h = n, xs[-1]
        memory.begin_step(LEVELS[n], ())
        program = method.step(stages, memory)
        command = next(program)
        try:
            while True:
                answer = None
                if isinstance(command, Latents):
                    answer = xs[-1]
                elif isinstance(command, Run):
                    answer = Ran(Stream(h))
                    for index in command.blocks:
                        h = blocks[index](h)
                    answer.after = Stream(h)
                elif isinstance(command, Skip):
                    h = h + command.stand_in.img
                elif isinstance(command, Forward):
                    for block in blocks:
                        h = block(h)
                    answer = [h]
                elif isinstance(command, Stand):
                    (h,) = command.tensors
                command = program.send(answer)
        except StopIteration:
            memory.end_step()
        xs.append(xs[-1] + (LEVELS[n + 1] - LEVELS[n]) * h)
    return network.runs, xs


def theirs(model: SimpleNamespace, network: Network, forward) -> tuple[list[int], list[torch.Tensor]]:
    """The same sampler with a forward of theirs; `forward(model, x, n)` gives the output at step n."""
    xs = [noise()]
    for n in range(STEPS):
        model.now = n
        xs.append(xs[-1] + (LEVELS[n + 1] - LEVELS[n]) * forward(model, xs[-1], n))
    return network.runs, xs


def wan(network: Network, **settings) -> SimpleNamespace:
    """What a forward of theirs for Wan reads of its model."""

    class Embed:
        weight = torch.zeros(1)

        def __call__(self, x):
            return x

    model = SimpleNamespace(
        model_type="t2v", patch_embedding=Embed(), freqs=torch.zeros(1), freq_dim=4, dim=2, text_len=3, now=0,
        time_embedding=lambda e: e, time_projection=lambda e: torch.zeros(1, 12),
        text_embedding=lambda c: c, head=lambda x, e: x, unpatchify=lambda x, grid: [_video(x)], cnt=0,
        num_steps=2 * STEPS, **settings,
    )  # fmt: skip
    model.blocks = network.blocks(lambda: model.now)
    return model


def _video(x: torch.Tensor) -> torch.Tensor:
    """(C, 1, 1, tokens) of tokens (1, tokens, C)."""
    return x[0].T[:, None, None, :].contiguous()


def _wan_forward(function):
    """With both guidance branches, as their loop calls it; of the second the output is left."""

    def forward(model, x, n):
        call = {"t": torch.tensor([1000 * LEVELS[n]]), "context": [torch.zeros(2, 4)], "seq_len": TOKENS}
        (out,) = function(model, [_video(x)], **call)
        runs = len(model.network.runs)
        function(model, [_video(x)], **call)
        del model.network.runs[runs:]
        return out[:, 0, 0].T[None]

    return forward


WAN = {
    "amp": SimpleNamespace(autocast=lambda **_: nullcontext()),
    "sinusoidal_embedding_1d": lambda size, t: torch.zeros(1, size),
    "logging": SimpleNamespace(info=lambda *_: None),
}


def same(found, expected) -> None:
    assert found[0] == expected[0]
    assert 1 < len(found[0]) < STEPS  # something was decided
    torch.testing.assert_close(found[1][-1], expected[1][-1], rtol=1e-4, atol=1e-5)


@needs("EasyCache")
@pytest.mark.parametrize("threshold", [0.03, 0.05, 0.1])
def test_easycache(threshold):
    network = Network()
    model = wan(network, thresh=threshold, ret_steps=20, cutoff_steps=2 * STEPS - 2)
    model.network = network
    forward = function(
        AUTHORS / "EasyCache/EasyCache4Wan2.1/easycache_generate.py", "easycache_forward", **WAN
    )
    same(
        ours(EasyCacheConfig(threshold=threshold, warmup_steps=10)),
        theirs(model, network, _wan_forward(forward)),
    )


@needs("SenCache")
@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.6])
def test_sencache(threshold):
    network, root = Network(), math.sqrt(TOKENS * WIDTH)
    times = np.array([1000.0, 700.0, 400.0, 100.0])
    by_x, by_t = [1.0, 0.8, 0.9, 1.5], [0.004, 0.002, 0.003, 0.006]
    model = wan(
        network, threshold_switch_step=round(2 * STEPS * 0.2), sencache_threshold_start=threshold / 3 * root,
        sencache_threshold_main=threshold * root, ret_steps=0, cutoff_steps=2 * STEPS, cached_z=None,
        cached_t=None, sencache_K=4, accumulated_skips=0, skip_this_step=False, current_skip_count=0,
        all_skip_counts=[], J_z_norm=by_x, J_t_norm=[v * root for v in by_t], sencache_timesteps_array=times,
    )  # fmt: skip
    model.network = network
    forward = function(AUTHORS / "SenCache/Wan2.1/sencache.py", "sencache_forward", **WAN)
    config = SenCacheConfig(
        threshold=threshold, early_threshold=threshold / 3, max_consecutive_hits=4, times=tuple(times / 1000),
        by_latents=tuple(by_x), by_time=tuple(1000 * v for v in by_t),
    )  # fmt: skip
    same(ours(config), theirs(model, network, _wan_forward(forward)))


@needs("DiCache")
@pytest.mark.parametrize(
    ("error", "choice", "threshold", "retention", "depth"),
    [
        ("probe", "delta_y", 0.05, 0.2, 1),
        ("probe", "delta_y", 0.15, 0.1, 2),
        ("excess", "delta_minus", 0.002, 0.0, 1),
        ("excess", "delta_minus", 0.01, 0.0, 3),
    ],
)
def test_dicache(error, choice, threshold, retention, depth):
    network, keep = Network(), lambda x, *_: x
    model = SimpleNamespace(
        x_embedder=lambda x: x.clone(), time_text_embed=lambda *_: None,
        context_embedder=keep, pos_embed=keep,
        norm_out=keep, proj_out=keep, single_transformer_blocks=[], gradient_checkpointing=False, cnt=0,
        num_steps=STEPS, enable_dicache=True, probe_depth=depth, rel_l1_thresh=threshold, ret_ratio=retention,
        error_choice=choice, accumulated_rel_l1_distance=0, residual_window=[], probe_residual_window=[],
        previous_residual=None, training=False,
    )  # fmt: skip

    def two_streams(block):
        return lambda hidden_states, encoder_hidden_states, **_: (encoder_hidden_states, block(hidden_states))

    model.transformer_blocks = [two_streams(block) for block in network.blocks(lambda: model.now)]
    given = {"USE_PEFT_BACKEND": False, "logger": None, "scale_lora_layers": None}
    forward = function(AUTHORS / "DiCache/FLUX/run_flux_dicache.py", "dicache_forward", **given)
    ids = torch.zeros(1, 3)

    def call(model, x, n):
        inputs = (x, torch.zeros(1, 1, WIDTH), None, torch.tensor([LEVELS[n]]), ids, ids)
        return forward(model, *inputs, return_dict=False)[0]

    config = DiCacheConfig(threshold=threshold, retention=retention, depth=depth, error=error)
    with torch.no_grad():
        same(ours(config), theirs(model, network, call))


@needs("MeanCache")
@pytest.mark.parametrize("budget", [13, 15, 17, 20, 25])
def test_meancache(budget):
    """Their mean velocity, read off the latents, under their schedule for Z-Image."""
    jvp = function(AUTHORS / "MeanCache/MeanCache4Z-Image/MC_zimage.py", "compute_current_jvp")
    config = MeanCacheConfig(budget=budget)
    schedule, network = config.schedule(STEPS), Network()
    log: dict[str, list] = {name: [] for name in ("v", "latents_pre", "latents", "sigmas_pre", "sigmas")}

    def forward(model, x, n):
        if schedule[n]:
            ahead = LEVELS[n + 1] - LEVELS[n]
            v = log["v"][-1] - jvp(log, log["v"], steps=schedule[n]).reshape(x.shape) * ahead
        else:
            v = x
            for block in network.blocks(lambda: n):
                v = block(v)
        after = x + (LEVELS[n + 1] - LEVELS[n]) * v
        news = (v, x, after, torch.tensor([LEVELS[n]]), torch.tensor([LEVELS[n + 1]]))
        for name, value in zip(log, news, strict=True):
            log[name].append(value)
        return v

    found, expected = ours(config), theirs(SimpleNamespace(), network, forward)
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1][-1], expected[1][-1], rtol=1e-3, atol=1e-3)


@needs("Spectrum")
@pytest.mark.parametrize("mix", [0.5, 1.0])
def test_spectrum(mix):
    """Their forecaster at every skipped step, in float32 in place of its bfloat16."""
    spec = importlib.util.spec_from_file_location("basis", AUTHORS / "Spectrum/src/utils/basis_utils.py")
    basis = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(basis)
    basis.DTYPE = torch.float32
    forecaster = basis.Spectrum(basis.ChebyshevForecaster(M=4, K=100, lam=0.1), taylor_order=1, w=mix)
    fit, schedule = Fit(4, 0.1, STEPS), SpectrumConfig().schedule(STEPS)
    _, xs = ours(SpectrumConfig())
    for n, full in enumerate(schedule):
        if full:
            fit.learn(xs[n], float(n))
            forecaster.update(float(n), xs[n].reshape(-1))
        else:
            expected = forecaster.predict(float(n)).reshape(xs[n].shape)
            torch.testing.assert_close(fit.predict(float(n), mix), expected, rtol=1e-3, atol=1e-3)


@needs("Spectrum")
@pytest.mark.parametrize(("window", "growth"), [(2.0, 0.75), (2.0, 3.0), (3.0, 0.4), (1.0, 0.0)])
def test_the_schedule_of_spectrum(window, growth):
    path = AUTHORS / "Spectrum/src/pipelines/flux_forward.py"
    (node,) = (n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef))
    first = next(i for i, s in enumerate(node.body) if ast.unparse(s) == "actual_forward = True")
    code = compile(ast.Module(node.body[first : first + 6], []), str(path), "exec")
    state = SimpleNamespace(
        cnt=0, warmup_steps=5, num_consecutive_cached_steps=0, curr_ws=window, window_size=window,
        flex_window=growth, flex_w=False, num_steps=STEPS, actual_forward_counter=0,
    )  # fmt: skip
    found = []
    for _ in range(STEPS):
        names = {"self": state, "math": math, "current": {"block_activated_steps": [], "step": 0}}
        exec(code, names)
        found.append(names["actual_forward"])
    assert SpectrumConfig(window=window, growth=growth).schedule(STEPS) == found


@needs("BudCache")
@pytest.mark.parametrize("seed", range(20))
def test_the_moves_of_budcache(seed):
    path = AUTHORS / "BudCache/scripts/stage1_search_flux.py"
    helpers = {
        n: function(path, n) for n in ("_compute_from_cache", "_cache_from_compute", "_dedup_compute_list")
    }
    propose = function(path, "_gen_cand_sa", **helpers)
    around = function(path, "_gen_neighbor_hc", **helpers)
    steps = BudCacheConfig(budget=4 + seed).schedule(28)
    cached = [n for n in range(28) if n not in steps]
    random.seed(seed)
    chance = random.Random(seed)
    for _ in range(30):
        tried = propose(cached, 28, len(steps))
        assert proposal(steps, 28, chance) == tuple(n for n in range(28) if n not in tried)
    expected = [tuple(n for n in range(28) if n not in other) for other in around(cached, 28)]
    assert neighbours(steps, 28, chance) == expected


@pytest.mark.parametrize(("threshold", "most"), [(0.05, 2), (0.2, 2), (0.2, None)])
def test_seacache(threshold, most):
    """diffusers' filter and gate, on the samples that our run saw."""
    sea = pytest.importorskip("diffusers.hooks.sea_cache")
    computed, xs = ours(SeaCacheConfig(threshold=threshold, max_consecutive_hits=most, aspect=1.5))
    config = sea.SeaCacheConfig(threshold=threshold, max_consecutive_cached=most or 0)
    shared, state, found = sea.SeaCacheSharedState(), sea.SeaCacheContextState(), []
    for n, x in enumerate(xs[:-1]):
        video = x.unflatten(1, (4, 6)).movedim(-1, 1)[0][:, None]  # (C, 1, 4, 6)
        metadata = sea._SeaCacheForwardMetadata(n, LEVELS[n], STEPS, [video])
        full = shared.resolve_gate(state, metadata, sea._build_indicator(config, metadata), config)
        state.consecutive_cached = 0 if full else state.consecutive_cached + 1
        found += [n] * full
    assert computed == found
    assert 1 < len(found) < STEPS
