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
from functools import partial
from pathlib import Path

import torch

import h2cache
from analysis.cli import TINY, guarded, is_embedded
from analysis.drawing.draw import default_device, require_memory
from analysis.drawing.load import add_loading_arguments
from analysis.drawing.transformer import load_transformer, random_inputs
from analysis.measures.times import begun, in_turns, is_exact
from analysis.options import Parser, at_least_one, whole
from analysis.records import store
from analysis.records.compare import as_table
from analysis.records.provenance import provenance
from h2cache import H2Config

INF = float("inf")
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
