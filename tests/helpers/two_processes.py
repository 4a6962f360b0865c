"""What one of two processes does in `tests/library/test_parallel.py`: `main`.

Every case draws on one process, then on both together, and writes what came out. diffusers' own
`enable_parallelism` counts accelerators and fails where there is none, so `divide` does by hand what it does.
"""

import json
import math
from copy import deepcopy
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks import apply_context_parallel
from diffusers.hooks.tensor_parallel import _resolve_tp_plan, _styles
from diffusers.models import attention_dispatch
from diffusers.models._modeling_parallel import ParallelConfig
from h2cache.baselines.block_cache import BlockCacheConfig
from h2cache.baselines.clusca import ClusCaConfig
from h2cache.baselines.hicache import HiCacheConfig
from h2cache.baselines.magcache import MagCacheConfig
from h2cache.baselines.none import NoneConfig
from h2cache.baselines.speca import SpeCaConfig
from h2cache.baselines.taylorseer import TaylorSeerConfig
from h2cache.baselines.taylorseer_lite import TaylorSeerLiteConfig
from h2cache.baselines.teacache import TeaCacheConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

import h2cache
from analysis.tiny_families import FAMILIES
from h2cache import H2Config, PlanConfig, step_records
from h2cache.engines import find_engine
from h2cache.parallel import Group, Tokens
from h2cache.similarity import magnitude, pooled_summary
from tests.helpers.toys import make_flux, make_inputs

INF = math.inf
LINE = (0.0, 0.0, 0.0, 1.0, 0.0)
SMALL = {"pool1": 8, "pool2": 12}  # so that the windows hold two tokens
METHODS = {
    "h2cache": H2Config(tau1=0.4, tau2=0.4, **SMALL),
    "h2cache, mean": H2Config(tau1=0.35, tau2=0.35, reduce="mean", **SMALL),
    "h2cache, warm-up": H2Config(tau1=INF, tau2=INF, warmup_steps=3, max_consecutive_hits=2),
    "h2cache, Taylor": H2Config(tau1=0.4, tau2=0.45, predictor="taylor"),
    "h2cache, DMD": H2Config(tau1=INF, tau2=INF, warmup_steps=5, predictor="dmd", repay=True),
    "block_cache": BlockCacheConfig(threshold=0.4),
    "teacache": TeaCacheConfig(threshold=0.1, coefficients=LINE),
    "magcache": MagCacheConfig(ratios=(1.0, 0.9), retention=0.0, max_consecutive_hits=3, threshold=9.0),
    "taylorseer": TaylorSeerConfig(warmup_steps=1, interval=3),
    "taylorseer, stages": TaylorSeerConfig(warmup_steps=1, interval=3, granularity="stage"),
    "taylorseer_lite": TaylorSeerLiteConfig(warmup_steps=1, interval=3),
    "taylorseer_lite, hidden": TaylorSeerLiteConfig(warmup_steps=1, interval=3, lite_at="hidden"),
    "hicache": HiCacheConfig(warmup_steps=1, interval=3),
    "speca": SpeCaConfig(warmup_steps=1, measure="norm", base=0.05, floor=0.001),
    "speca, stages": SpeCaConfig(warmup_steps=1, measure="norm", base=0.05, floor=0.001, granularity="stage"),
    "clusca, no clusters": ClusCaConfig(warmup_steps=1, interval=3, clusters=0),
    "none": NoneConfig(),
}
NOUGHT = {
    "h2cache at 0": H2Config(tau1=0, tau2=0),
    "block_cache at 0": BlockCacheConfig(threshold=0.0),
    "teacache at 0": TeaCacheConfig(threshold=0.0, coefficients=LINE),
    "taylorseer at 1": TaylorSeerConfig(interval=1),
}
FAMILY_METHODS = {
    "h2cache": H2Config(tau1=0.3, tau2=0.3, **SMALL),  # skips all but the first block
    "teacache": TeaCacheConfig(
        threshold=0.25, coefficients=LINE
    ),  # skips the first block too, and looks at it
    "plan": PlanConfig(speedup=2),
    "taylorseer": TaylorSeerConfig(interval=3, order=1, warmup_steps=2),
}
WITH_TENSORS = ("h2cache", "h2cache, DMD", "teacache", "taylorseer", "speca", "h2cache at 0")
STEPS, WORLD = 8, 2
ON_CPU = attention_dispatch.AttentionBackendName._NATIVE_MATH  # no other test uses it


def divide(model, **how) -> None:
    """Context parallelism over both processes, as `model.enable_parallelism` would."""
    config = ContextParallelConfig(**how or {"ulysses_degree": WORLD})
    mesh = init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    whole = ParallelConfig(context_parallel_config=config)
    whole.setup(dist.get_rank(), WORLD, torch.device("cpu"), mesh=mesh)
    model._parallel_config = whole
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = whole
            if config.ring_degree > 1:
                module.processor._attention_backend = ON_CPU
    apply_context_parallel(model, config, model._cp_plan)


@attention_dispatch._AttentionBackendRegistry.register(ON_CPU, supports_context_parallel=True)
def ring_attention(query, key, value, attn_mask=None, _parallel_config=None, **rest) -> torch.Tensor:
    """diffusers' ring, with an attention for a CPU that gives the sums which a ring joins parts by."""

    def part(ctx, query, key, value, *rest, **kwargs):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out.transpose(1, 2), lse.transpose(1, 2)

    return attention_dispatch._templated_context_parallel_attention(
        query, key, value, forward_op=part, backward_op=None, _parallel_config=_parallel_config
    )


def shard(model) -> None:
    """Tensor parallelism over both processes, by diffusers' own plan."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for block, plan in _resolve_tp_plan(model, model._tp_plan):
        parallelize_module(block, mesh, _styles(plan))


def outcomes(target) -> list:
    """What was decided, step by step."""
    return [(r.step, r.branch, r.stage, r.outcome, r.blocks_run) for r in step_records(target)]


def measures(target) -> dict:
    """What was measured."""
    records = step_records(target)
    return {f"{r.step} {r.branch} {r.stage}": r.measure for r in records if r.measure is not None}


def called(model, inputs: dict, step: int, branch: str = "cond") -> torch.Tensor:
    """One call, as a pipeline makes it; diffusers' hooks want a tuple."""
    timestep = torch.full((len(inputs["hidden_states"]),), 1 - step / STEPS)
    with torch.no_grad(), model.cache_context(branch):
        return model(**inputs | {"timestep": timestep}, return_dict=False)[0]


def drawn(model, **inputs) -> torch.Tensor:
    """The latents after a denoising loop."""
    inputs = make_inputs(batch=2, text=8) | inputs
    for n in range(STEPS):
        inputs["hidden_states"] = inputs["hidden_states"] - called(model, inputs, n) / STEPS
    return inputs["hidden_states"]


def compared(one: tuple, many: tuple) -> dict:
    """What the test looks at."""
    difference = (many[0] - one[0]).abs().max().item() / one[0].abs().max().item()
    return {
        "difference": difference,
        "alone": one[1],
        "together": many[1],
        "measures alone": one[2],
        "measures": many[2],
    }


def run(model, config, **inputs) -> tuple:
    h2cache.enable(model, config, steps=STEPS)
    out = drawn(model, **inputs), outcomes(model), measures(model)
    h2cache.disable(model)
    return out


def toys() -> dict:
    """A small FLUX, alone and on both processes."""
    model = make_flux(2, 3)
    many, whole = deepcopy(model), deepcopy(model)
    divide(many)
    shard(whole)
    found, uncached = {}, drawn(many)
    for name, config in (METHODS | NOUGHT).items():
        alone, together = run(model, config), run(many, config)
        found[f"context, {name}"] = compared(alone, together)
        if name in NOUGHT:
            found[f"uncached, {name}"] = torch.equal(together[0], uncached)
        if name in WITH_TENSORS:
            found[f"tensor, {name}"] = compared(alone, run(whole, config))
    ids = make_inputs()["img_ids"].clone()
    ids[8:, 0] = 1  # a reference image: the second process draws nothing
    found["context, reference"] = compared(*(run(m, METHODS["h2cache"], img_ids=ids) for m in (model, many)))
    found |= windows(model)
    alone = run(model, METHODS["h2cache"])
    for name, spread in {
        "ulysses": divide,
        "ring": partial(divide, ring_degree=WORLD),
        "tensor": shard,
    }.items():
        early = deepcopy(model)
        h2cache.enable(early, METHODS["h2cache"])
        spread(early)
        together = drawn(early), outcomes(early), measures(early)
        found[f"{name}, enabled before"] = compared(alone, together)
    found["uneven"] = uneven()
    found["doubting"] = doubting(many, warmup=1)
    found["doubting in the warm-up"] = doubting(many, warmup=5)
    found["context, after one that was broken off"] = interrupted(many)
    found["clusters"] = refusal(many, ClusCaConfig())
    found["branches"] = guided(model)
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        fully_shard(block, mesh=mesh)
    found["FSDP"] = refusal(model, H2Config())
    return found


def windows(model) -> dict:
    """Tokens of a process that are no multiple of a check's window, by Ulysses and by ring."""
    found = {}
    shapes = {"22 tokens": (22, 10, None), "18 tokens": (18, 6, None), "a reference": (18, 6, 11)}
    for way in ("ulysses", "ring"):
        many = deepcopy(model)
        divide(many, **{f"{way}_degree": WORLD})
        for name, (image, text, drawn) in shapes.items():
            inputs = make_inputs(batch=2, tokens=image, text=text)
            if drawn:
                inputs["img_ids"][drawn:, 0] = 1
            config = H2Config(tau1=0.4, tau2=0.4, window1=3, window2=6)
            both = (run(m, config, **inputs) for m in (model, many))
            found[f"{way}, {name}"] = compared(*both)
    return found


def uneven() -> float:
    """How far the sums of pooled windows are from those of one process, where shares differ in size.

    No model: diffusers gathers such shares by a call that gloo does not have.
    """
    group, worst = Group(dist.group.WORLD, divided=True), 0.0
    for image, text, drawn in [(17, 0, None), (17, 7, None), (15, 5, slice(0, 6)), (9, 3, slice(4, 9))]:
        target = range(image)[drawn or slice(None)]
        whole = torch.randn(2, text + image, 12, generator=torch.Generator().manual_seed(image))
        compared = torch.cat([whole[:, :text], whole[:, text:][:, target.start : target.stop]], 1)
        tokens = Tokens(group, image, text, drawn)
        mine = [whole[:, list(group.part(text))], whole[:, [text + n for n in group.part(image)]]]
        own = torch.cat([mine[0], mine[1][:, tokens.targets or slice(None)]], 1)
        for window in range(1, 9):
            sums = group.total(magnitude(tokens.pooled(own, 100, window)))
            alone = magnitude(pooled_summary(compared, 100, window))
            worst = max(worst, ((sums - alone) / alone).abs().max().item())
    return worst


def doubting(model, warmup: int) -> list:
    """One process forgets in mid-run: what both then do."""
    config, inputs, seen = H2Config(tau1=INF, tau2=INF, warmup_steps=warmup), make_inputs(text=8), []
    h2cache.enable(model, config)
    for n in range(6):
        if n == 3 and dist.get_rank() == 1:
            h2cache.enable(model, config)
        called(model, inputs, n)
        seen.append((step_records(model)[-1].step, step_records(model)[-1].outcome))
    h2cache.disable(model)
    return seen


def interrupted(model) -> dict:
    """A request that is broken off in mid-forward on both, and the next one, against that one alone."""

    def stop(*args) -> None:
        raise KeyboardInterrupt

    config = METHODS["h2cache"]
    alone = run(model, config)
    h2cache.enable(model, config, steps=STEPS)
    for n in range(3):
        called(model, make_inputs(batch=2, text=8), n)
    handle = model.single_transformer_blocks[0].register_forward_pre_hook(stop)  # a stage's head: it runs
    try:
        called(model, make_inputs(batch=2, text=8), 3)
    except KeyboardInterrupt:
        handle.remove()
    again = drawn(model), outcomes(model), measures(model)
    h2cache.disable(model)
    return compared(alone, again)


def refusal(model, config) -> str:
    """Why `config` is refused."""
    try:
        h2cache.enable(model, config)
    except ValueError as error:
        return str(error)
    return ""


def guided(model) -> float:
    """Each process draws one guidance branch: how far from both on one process."""
    names = ("cond", "uncond")

    def loop(branches: tuple, combine) -> torch.Tensor:
        latents = make_inputs(text=8)["hidden_states"]
        h2cache.enable(model, H2Config(tau1=0.4, tau2=0.4))
        for n in range(STEPS):
            outs = []
            for name in branches:
                inputs = make_inputs(text=8, seed=names.index(name)) | {"hidden_states": latents}
                inputs["encoder_hidden_states"] = texts[name]
                outs.append(called(model, inputs, n, name))
            latents = latents - combine(outs) / STEPS
        h2cache.disable(model)
        return latents

    def gather(outs: list) -> torch.Tensor:
        both = [torch.empty_like(outs[0]) for _ in range(WORLD)]
        dist.all_gather(both, outs[0])
        return guidance(both)

    def guidance(both: list) -> torch.Tensor:
        return both[1] + 3 * (both[0] - both[1])

    texts = {n: make_inputs(text=8, seed=k)["encoder_hidden_states"] for k, n in enumerate(names)}
    together = loop(names[dist.get_rank() :][:1], gather)
    return (loop(names, guidance) - together).abs().max().item()


def latents_of(pipe, call: dict) -> torch.Tensor:
    seed = torch.Generator().manual_seed(0)
    return pipe(**call | {"generator": seed, "output_type": "latent", "num_inference_steps": STEPS})[0]


def families() -> dict:
    """Pipelines whose plans divide the tokens at other places."""
    found = {}
    for family in ("flux", "flux2", "qwen_image", "wan"):
        pipe, call = FAMILIES[family]()
        one, many = pipe.transformer, deepcopy(pipe.transformer)
        divide(many)
        offered = find_engine(one).offers | {"whole"}
        served = {name: config for name, config in FAMILY_METHODS.items() if config.requires <= offered}
        for name, config in served.items():
            seen = []
            for model in (one, many):
                pipe.transformer = model
                h2cache.enable(pipe, config)
                seen.append((latents_of(pipe, call), outcomes(pipe), measures(pipe)))
                h2cache.disable(pipe)
            found[f"{family}, {name}"] = compared(*seen)
    return found


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meet", rank=rank, world_size=WORLD, timeout=timedelta(seconds=20)
    )
    found = toys() | families()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
