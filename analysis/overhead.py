"""What a cache costs by itself: steps with hits against head blocks alone, with misses against uncached.

    python -m analysis.overhead                                   # the embedded model
    python -m analysis.overhead --width 3072 --tokens 4096 --text 512 --device cuda --dtype bfloat16

The reference of a hit is the same transformer with only its head blocks: embeddings, one block of each stage
(of Block Cache the first alone) and the output layer; of a miss the uncached step. Contestants take turns, a
burst of steps each; medians are reported. Blocks, tensor operations and Python's calls are counted: on a busy
machine they alone say something. "diffusers" is its own first-block cache, a Block Cache. The second model is
made of random weights with the depth and width that you name.
"""

from __future__ import annotations

import argparse
import json
from functools import partial

import torch
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel

import h2cache
from analysis.cli import TINY, guarded
from analysis.drawing.draw import check_device
from analysis.drawing.transformer import only_heads, random_inputs, sized_flux
from analysis.measures.times import begun, counted, in_turns
from analysis.options import Parser, at_least_one
from analysis.records.provenance import machine
from h2cache import H2Config, find_method

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
    dimensions = args.width, args.heads, args.double, args.single, args.tokens + args.text
    return sized_flux(*dimensions, args.device, dtype)


def run(args: argparse.Namespace) -> None:
    check_device(args.device)
    torch.set_num_threads(args.threads)
    model = build(args)
    heads, first = only_heads(model), only_heads(model, single=0)
    inputs = random_inputs(model.config, args.tokens, args.text, args.device, getattr(torch, args.dtype))

    kind = partial(begun, inputs=inputs, burst=args.burst)
    all_hit, block_cache = H2Config(tau1=INF, tau2=INF), find_method("block_cache")
    kinds = {
        "uncached": partial(kind, model, config=None),
        "all hit": partial(kind, model, config=all_hit),
        "structure miss": partial(kind, model, config=H2Config(tau1=0, tau2=INF)),
        "all miss": partial(kind, model, config=H2Config(tau1=0, tau2=0)),
        "block_cache hit": partial(kind, model, config=block_cache(threshold=INF)),
        "block_cache miss": partial(kind, model, config=block_cache(threshold=0.0)),
        "diffusers hit": partial(kind, model, config=FirstBlockCacheConfig(threshold=1e9)),
        "diffusers miss": partial(kind, model, config=FirstBlockCacheConfig(threshold=0.0)),
        "disabled": partial(kind, model, config=None),  # after it was on
        "heads": partial(kind, heads, config=None),
        "first": partial(kind, first, config=None),
    }
    without = {"all hit": "heads", "block_cache hit": "first", "diffusers hit": "first"}  # the model alone
    without |= dict.fromkeys(("all miss", "block_cache miss", "diffusers miss"), "uncached")
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
    kind(model, config=all_hit)()
    hit_blocks = sum(r.blocks_run for r in h2cache.step_records(model)[-2:])
    here = machine(args.device)
    report = {
        "milliseconds": {name: round(value, 4) for name, value in medians.items()},
        "overhead": overhead,
        "all hit / heads": round(medians["all hit"] / medians["heads"], 3),
        "disabled / uncached": round(medians["disabled"] / medians["uncached"], 3),
        "blocks of an all-hit step": hit_blocks,
        "device": f"{here['device_name']}, {here['threads']} thread(s)",
        "settings": vars(args),
    }
    print(json.dumps(report, indent=1))


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    return guarded(lambda: run(args), "nothing is measured")


if __name__ == "__main__":
    raise SystemExit(main())
