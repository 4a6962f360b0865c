"""Floating-point operations of a transformer's blocks, and from them those of a traced request.

Counted once with PyTorch's counter on real calls, per block; a request costs its executed blocks plus, at
every call, what is no block (embeddings, output layer). "analytic": nothing is counted while images are
timed. A head's modulation that TeaCache looks at on a skipped step is left out (below 0.01 % of a step).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from analysis.drawing.families import with_prompt
from h2cache.engines import find_engine
from h2cache.engines.base import lay_out


def _attention(query, key, value, *_, out_shape=None, **__) -> int:
    batch, heads, tokens, width = query
    return 4 * batch * heads * tokens * key[-2] * width


# PyTorch's own table has no entry for the CPU's attention kernel and counts 0 for it.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


@dataclass(frozen=True)
class StepCost:
    """Floating-point operations of one call of the transformer: a step, or one guidance branch of a step."""

    blocks: dict[str, float]  # of one block, by stage
    rest: float  # embeddings and output layer

    def tflops(self, trace: list[dict]) -> float:
        """Tera-operations of a request, from its step records.

        Where a method answers for the whole "model", a skipped step has no embeddings and output either.
        """
        called = [r for r in trace if r["stage"] != "model" or r["blocks_run"]]
        steps = len({(r["branch"], r["step"]) for r in called})
        return (sum(self.blocks[r["stage"]] * r["blocks_run"] for r in trace) + self.rest * steps) / 1e12


def count_forward(transformer: torch.nn.Module, call: Callable[[], Any]) -> StepCost:
    """Count a forward pass of `transformer`, uncached; where `call()` makes several, the mean of them."""
    calls: list[None] = []
    hook = transformer.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            call()
    finally:
        hook.remove()
    if not calls:
        raise ValueError(f"{type(transformer).__name__} was not called: no operations to count")
    root = type(transformer).__name__
    counts = {name: sum(ops.values()) / len(calls) for name, ops in counter.get_flop_counts().items()}
    spans, lists = lay_out(find_engine(transformer), transformer, split=None)
    names = [f"{root}.{name}.{n}" for name in lists for n in range(len(getattr(transformer, name)))]
    each = [counts[name] for name in names]
    blocks = {span.name: fmean(each[n] for n in span.blocks) for span in spans}
    return StepCost(blocks | {"model": fmean(each)}, counts[root] - sum(each))


def count_step(pipeline: DiffusionPipeline, call: dict) -> StepCost:
    """Count one call of `pipeline`'s transformer at the size and text length of `call`.

    Under classifier-free guidance a step has two, one for each branch; records count them apart. Of a
    quantized model, whose kernels PyTorch cannot count, the same model without quantization is counted.
    """
    few = {"num_inference_steps": 2, "output_type": "latent"}  # one step may be none where a picture goes in
    given = {"prompt", "prompt_embeds", "class_labels"} & call.keys()
    asked = with_prompt(pipeline, call | few | ({} if given else {"prompt": "a"}))
    if find_engine(pipeline.transformer).trainable:
        return count_forward(pipeline.transformer, lambda: pipeline(**asked))
    seen: list[dict] = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda *a: seen.append(a[2]), with_kwargs=True)
    try:
        pipeline(**asked)
    finally:
        hook.remove()
    with torch.device("meta"):  # shapes only
        plain = FluxTransformer2DModel.from_config(pipeline.transformer.config)
    inputs = {
        k: torch.empty_like(v, device="meta", dtype=torch.float32)
        for k, v in seen[0].items()
        if torch.is_tensor(v)
    }
    return count_forward(plain, lambda: plain(**inputs))
