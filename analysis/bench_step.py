r"""How long a step of each kind takes: nothing reused, the detail stage reused, both reused; and uncached.

    python -m analysis.bench_step                                           # the embedded model
    python -m analysis.bench_step --engine nunchaku --model black-forest-labs/FLUX.1-dev
    python -m analysis.bench_step --engine nunchaku --model black-forest-labs/FLUX.1-dev --v1
    python -m analysis.bench_step --engine diffusers --model black-forest-labs/FLUX.1-dev

Only the transformer is loaded and given random inputs of the right shapes; thresholds of zero and infinity
decide. The kinds take turns, a burst of steps each, and medians are reported. "ideal" is the share of blocks
that are executed. Also checked: at zero thresholds the output is that of the uncached model, bit by bit.
Please send us the table of your GPU.
"""

from __future__ import annotations

import argparse
import json
import re
from functools import partial
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

import h2cache
from analysis.cli import TINY, guarded, is_embedded
from analysis.drawing.draw import DTYPE, default_device, require_memory
from analysis.drawing.load import add_loading_arguments, check_loading, load_quantized
from analysis.measures.times import Step, in_turns, request
from analysis.options import Parser, at_least_one, whole
from analysis.records import store
from analysis.records.compare import as_table
from analysis.records.provenance import provenance
from h2cache import H2Config

INF = float("inf")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
KINDS = {  # thresholds that make every step but the first one of this kind
    "uncached": None,
    "miss, miss": H2Config(tau1=0, tau2=0),
    "miss, hit": H2Config(tau1=0, tau2=INF),
    "hit, hit": H2Config(tau1=INF, tau2=INF),
}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", default=TINY, help="folder or hub id (default: %(default)s)")
    add_loading_arguments(parser, default_device())
    parser.add_argument("--v1", action="store_true", help="nunchaku's V1, where V2 would do")
    parser.add_argument("--side", type=whole(16), help="of the image, in pixels (default: 1024)")
    parser.add_argument("--text", type=at_least_one, help="text tokens (default: 512)")
    parser.add_argument("--rounds", type=at_least_one, default=10)
    parser.add_argument("--burst", type=at_least_one, default=5, help="steps timed together")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    return parser.parse_args(argv)


def load_transformer(args: argparse.Namespace) -> torch.nn.Module:
    """The transformer that `args` ask for, without the rest of its pipeline."""
    if check_loading(args, args.device) == "nunchaku":
        return load_quantized(args, args.device, v1=args.v1)[0]
    if args.v1 or args.lora or args.offload:
        raise ValueError("--v1, --lora and --offload are measured with --engine nunchaku only")
    dtype = args.dtype or ("float32" if torch.device(args.device).type == "cpu" else "bfloat16")
    if not Path(args.model).expanduser().exists() and not HUB_ID.fullmatch(args.model):
        raise FileNotFoundError(
            f"no model folder {args.model!r}, and it has not the form owner/name of a hub id"
        )
    model = FluxTransformer2DModel.from_pretrained(
        args.model, subfolder="transformer", use_safetensors=True, **{DTYPE: getattr(torch, dtype)}
    )
    return model.to(args.device).eval()


def random_inputs(config, tokens: int, text: int, device: str, dtype: torch.dtype) -> dict:
    """Arguments of one forward call of a FLUX transformer with this `config`, for a square image."""
    kw, side = {"device": device}, int(tokens**0.5)
    ids = torch.zeros(tokens, 3, **kw)
    ids[:, 1], ids[:, 2] = torch.arange(tokens, **kw) // side, torch.arange(tokens, **kw) % side
    generator = torch.Generator("cpu").manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator).to(device, dtype)

    return {
        "hidden_states": noise(tokens, config.in_channels),
        "encoder_hidden_states": noise(text, config.joint_attention_dim),
        "pooled_projections": noise(config.pooled_projection_dim),
        "timestep": torch.full((1,), 0.5, **kw),
        "guidance": torch.full((1,), 3.5, **kw) if config.guidance_embeds else None,
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3, **kw),
        "return_dict": False,
    }


def begun(transformer: torch.nn.Module, inputs: dict, config: H2Config | None, burst: int) -> Step:
    """The steps of a request after its first one, under the cache of one kind of step."""
    h2cache.disable(transformer) if config is None else h2cache.enable(transformer, config)
    step = request(transformer, inputs, burst)
    step()
    return step


def is_exact(transformer: torch.nn.Module, inputs: dict) -> bool:
    """Whether the output at zero thresholds is the uncached one, at a first and at a later step."""
    h2cache.disable(transformer)
    plain = request(transformer, inputs, 1)
    wanted = [plain(), plain()]
    h2cache.enable(transformer, KINDS["miss, miss"])
    cached = request(transformer, inputs, 1)
    return all(torch.equal(picture, cached()) for picture in wanted)


def measure(transformer: torch.nn.Module, inputs: dict, rounds: int, burst: int) -> list[dict]:
    """One row for each kind of step."""
    kinds = {kind: partial(begun, transformer, inputs, config, burst) for kind, config in KINDS.items()}
    times, rows = in_turns(kinds, rounds, burst), []
    for kind, config in KINDS.items():
        begun(transformer, inputs, config or H2Config(tau1=0, tau2=0), burst)()
        last = h2cache.step_records(transformer)[-2:]
        run = sum(r.blocks_run for r in last)
        rows.append(
            {
                "step": kind,
                "milliseconds": round(1e3 * times[kind].median, 4),
                "fastest": round(1e3 * min(times[kind].times), 4),
                "slowest": round(1e3 * max(times[kind].times), 4),
                "share": round(times[kind].median / times["uncached"].median, 4),
                "blocks": run,
                "ideal": round(run / sum(r.blocks for r in last), 4),
            }
        )
    h2cache.disable(transformer)
    return rows


def run(args: argparse.Namespace) -> int:
    require_memory(args.side, args.side)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    transformer = load_transformer(args)
    embedded = is_embedded(args.model)
    side, text = args.side or (128 if embedded else 1024), args.text or (24 if embedded else 512)
    inputs = random_inputs(transformer.config, (side // 16) ** 2, text, args.device, transformer.dtype)
    report = {
        "transformer": type(transformer).__name__,
        "identical at zero thresholds": is_exact(transformer, inputs),
        "steps": measure(transformer, inputs, args.rounds, args.burst),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        | {"side": side, "text": text, "dtype": str(transformer.dtype)},
        **provenance("bench_step", args.device),
    }
    print(f"{report['transformer']}, {side}x{side}, {report['machine']['device_name']}, {report['date']}")
    print(f"identical at zero thresholds: {'yes' if report['identical at zero thresholds'] else 'NO'}\n")
    heads = ("step (structure, detail)", "ms, median", "fastest to slowest", "of uncached", "blocks", "ideal")
    cells = [
        (row["step"], f"{row['milliseconds']:.2f}", f"{row['fastest']:.2f} to {row['slowest']:.2f}",
         f"{row['share']:.1%}", row["blocks"], f"{row['ideal']:.1%}")
        for row in report["steps"]
    ]  # fmt: skip
    print("\n".join(as_table(heads, cells)))
    if args.out:
        store.write_atomically(args.out, json.dumps(report, indent=1).encode())
    return 0 if report["identical at zero thresholds"] else 1


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    return guarded(lambda: run(args), "nothing is written")


if __name__ == "__main__":
    raise SystemExit(main())
