"""Floating-point operations of a transformer's blocks, and from them those of a traced request.

Counted once with PyTorch's counter on one real step, per block; a request costs its executed blocks plus, at
every step, what is no block (embeddings, output layer). "analytic": nothing is counted while images are
timed. A head's modulation that TeaCache looks at on a skipped step is left out (below 0.01 % of a step).
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from h2cache.engines import find_engine, lay_out


def _attention(query, key, value, *_, out_shape=None, **__) -> int:
    batch, heads, tokens, width = query
    return 4 * batch * heads * tokens * key[-2] * width


# PyTorch's own table has no entry for the CPU's attention kernel and counts 0 for it.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


@dataclass(frozen=True)
class StepCost:
    """Floating-point operations of one step."""

    blocks: dict[str, float]  # of one block, by stage
    rest: float  # embeddings and output layer

    def tflops(self, trace: list[dict]) -> float:
        """Tera-operations of a request, from its step records."""
        steps = len({(r["branch"], r["step"]) for r in trace})
        return (sum(self.blocks[r["stage"]] * r["blocks_run"] for r in trace) + self.rest * steps) / 1e12


def count_forward(transformer: torch.nn.Module, call) -> StepCost:
    """Count one forward pass of `transformer`, made by `call()`, uncached."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        call()
    root = type(transformer).__name__
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    spans, lists = lay_out(find_engine(transformer), transformer, split=None)
    each = [counts[f"{root}.{name}.{n}"] for name in lists for n in range(len(getattr(transformer, name)))]
    blocks = {span.name: fmean(each[n] for n in span.blocks) for span in spans}
    return StepCost(blocks, counts[root] - sum(each))


def count_step(pipeline: DiffusionPipeline, call: dict) -> StepCost:
    """Count one step of `pipeline` at the size and text length of `call`.

    Of a quantized model, whose kernels PyTorch cannot count, the same model without quantization is counted.
    """
    one = call | {"num_inference_steps": 1, "output_type": "latent"}
    if find_engine(pipeline.transformer).trainable:
        return count_forward(pipeline.transformer, lambda: pipeline(prompt="a", **one))
    seen: list[dict] = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda *a: seen.append(a[2]), with_kwargs=True)
    try:
        pipeline(prompt="a", **one)
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
