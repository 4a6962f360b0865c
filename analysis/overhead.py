r"""What a cache costs by itself: steps with hits against head blocks alone, with misses against uncached.

    python -m analysis.overhead                                   # the embedded model
    python -m analysis.overhead --width 3072 --heads 24 --tokens 4096 --text 512 --device cuda \
        --dtype bfloat16

The reference of a hit is the same transformer with only its head blocks: embeddings, one block of each stage
(of Block Cache the first alone) and the output layer; of a miss the uncached step. Contestants take turns, a
burst of steps each; medians are reported. Blocks, tensor operations and Python's calls are counted: on a busy
machine they alone tell something.
The second model is made of random weights with the depth and width that you name.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
from collections.abc import Callable
from functools import partial

import torch
from diffusers import FluxTransformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode

import h2cache
from analysis.cli import TINY, guarded
from analysis.drawing.draw import check_device
from analysis.drawing.transformer import only_heads, random_flux, random_inputs
from analysis.measures.times import Step, begun, in_turns
from analysis.options import Parser, at_least_one
from analysis.records.provenance import machine
from h2cache import H2Config, MethodConfig, find_method
from h2cache.room import free_bytes

INF = float("inf")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--width", type=at_least_one, help="random model of this width (default: embedded)")
    parser.add_argument("--heads", type=at_least_one, default=24)
    parser.add_argument("--double", type=at_least_one, default=19, help="its double-stream blocks")
    parser.add_argument("--single", type=at_least_one, default=38, help="its single-stream blocks")
    parser.add_argument("--tokens", type=at_least_one, default=64, help="image tokens")
    parser.add_argument("--text", type=at_least_one, default=24, help="text tokens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--threads", type=at_least_one, default=1)
    parser.add_argument("--rounds", type=at_least_one, default=40)
    parser.add_argument("--burst", type=at_least_one, default=20, help="steps timed together")
    args = parser.parse_args(argv)
    if args.width is not None and args.width // args.heads < 8:
        parser.error(f"--width {args.width}: at least 8 for each of {args.heads} heads is needed")
    return args


def build(args: argparse.Namespace) -> FluxTransformer2DModel:
    """The embedded transformer, or one of random weights with the dimensions asked for."""
    dtype = getattr(torch, args.dtype)
    if args.width is None:
        model = FluxTransformer2DModel.from_pretrained(TINY, subfolder="transformer", use_safetensors=True)
        return model.to(args.device, dtype).eval()
    numbers = (36 * args.double + 15 * args.single) * args.width**2  # weights of the blocks
    numbers += (args.tokens + args.text) * args.width * 12  # and what a block computes
    needed, free = numbers * dtype.itemsize, free_bytes(torch.device(args.device))
    if needed > free:
        raise MemoryError(
            f"--width {args.width}: the model takes {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB "
            "are free: lower --width, --double, --single or --tokens"
        )
    head = args.width // args.heads
    side = head * 7 // 32 * 2  # FLUX.1-dev: (16, 56, 56) of 128
    axes = (head - 2 * side, side, side)
    shape = {"attention_head_dim": head, "num_attention_heads": args.heads, "axes_dims_rope": axes}
    return random_flux(args.double, args.single, args.device, dtype, **shape)


class _Operations(TorchDispatchMode):
    """Counts what PyTorch carries out."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        return operation(*args, **(kwargs or {}))


def counted(ready: Callable[[], Step]) -> tuple[int, int]:
    """Tensor operations of a step, and calls from Python."""
    step, profile = ready(), cProfile.Profile()
    step()  # the first after a computed one measures the reference once
    with _Operations() as operations:
        step()
    profile.runcall(step)
    return operations.count, pstats.Stats(profile).total_calls


def run(args: argparse.Namespace) -> None:
    check_device(args.device)
    torch.set_num_threads(args.threads)
    model = build(args)
    heads, first = only_heads(model), only_heads(model, single=0)
    inputs = random_inputs(model.config, args.tokens, args.text, args.device, getattr(torch, args.dtype))

    def kind(transformer: FluxTransformer2DModel, config: MethodConfig | None = None) -> Step:
        return begun(transformer, inputs, config, args.burst)

    all_hit, block_cache = H2Config(tau1=INF, tau2=INF), find_method("block_cache")
    kinds = {
        "uncached": partial(kind, model),
        "all hit": partial(kind, model, all_hit),
        "structure miss": partial(kind, model, H2Config(tau1=0, tau2=INF)),
        "all miss": partial(kind, model, H2Config(tau1=0, tau2=0)),
        "block_cache hit": partial(kind, model, block_cache(threshold=INF)),
        "block_cache miss": partial(kind, model, block_cache(threshold=0.0)),
        "disabled": partial(kind, model),  # after it was on
        "heads": partial(kind, heads),
        "first": partial(kind, first),
    }
    without = {  # what the model alone does at such a step
        "all hit": "heads",
        "all miss": "uncached",
        "block_cache hit": "first",
        "block_cache miss": "uncached",
    }
    times = in_turns(kinds, args.rounds, args.burst)
    medians = {name: found.median * 1e3 for name, found in times.items()}
    counts = {name: counted(kinds[name]) for name in {*without, *without.values()}}
    overhead = {
        name: {
            "ms": round(medians[name] - medians[other], 4),
            "tensor operations": counts[name][0] - counts[other][0],
            "calls": counts[name][1] - counts[other][1],
        }
        for name, other in without.items()
    }
    kind(model, all_hit)()
    hit_blocks = sum(r.blocks_run for r in h2cache.step_records(model)[-2:])
    here = machine(args.device)
    print(
        json.dumps(
            {
                "milliseconds": {name: round(value, 4) for name, value in medians.items()},
                "overhead": overhead,
                "all hit / heads": round(medians["all hit"] / medians["heads"], 3),
                "disabled / uncached": round(medians["disabled"] / medians["uncached"], 3),
                "blocks of an all-hit step": hit_blocks,
                "rounds": args.rounds,
                "device": f"{here['device_name']}, {here['threads']} thread(s)",
                "settings": vars(args),
            },
            indent=1,
        )
    )


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    return guarded(lambda: run(args), "nothing is measured")


if __name__ == "__main__":
    raise SystemExit(main())
