"""Draw the method: two stages, two checks on pooled feature summaries, and what a hit leaves out.

    python -m analysis.schematic                       # FLUX.1-dev at 1024x1024
    python -m analysis.schematic --model assets/tiny_flux --image-tokens 64 --text-tokens 24
    python -m analysis.schematic --out assets          # the file in the README

Names, block counts, thresholds and windows come from the code: the engine's stages, the model's configuration
and H2Config. Writes method.png/.pdf/.csv.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

from diffusers import FluxTransformer2DModel

from analysis.cli import figure_script
from analysis.figures.schematic import draw
from analysis.options import Parser, at_least_one, whole
from analysis.records import store
from h2cache import H2Config
from h2cache.engines.flux_diffusers import FluxDiffusers

COUNTS = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/schematic"), help="default: %(default)s")
    parser.add_argument("--run", action="store_true", help="nothing to repeat: it is drawn from the code")
    parser.add_argument("--model", type=Path, help="folder of a FLUX pipeline (default: FLUX.1-dev's counts)")
    parser.add_argument("--image-tokens", type=at_least_one, default=4096, help="default: those of 1024x1024")
    parser.add_argument("--text-tokens", type=whole(0), default=512)
    return parser.parse_args(argv)


def facts(args: argparse.Namespace) -> list[dict]:
    """One row for each stage: its blocks, threshold, and the window of its check."""
    signature = inspect.signature(FluxTransformer2DModel.__init__).parameters
    counts = {name: signature[name].default for name in COUNTS.values()}
    if args.model:
        path = args.model / "transformer" / "config.json"
        found = store.read_json(path)
        if not found or not all(isinstance(found.get(name), int) for name in counts):
            raise ValueError(f"{path} does not tell {' and '.join(counts)}: it is no FLUX transformer's")
        counts = {name: found[name] for name in counts}
    config = H2Config()
    rows = []
    for cut, n in zip(FluxDiffusers.cuts, (1, 2), strict=True):
        tokens = args.image_tokens + (args.text_tokens if cut.joint else 0)
        rows.append(
            {
                "stage": cut.name,
                "letter": "DS"[n - 1],
                "blocks": counts[COUNTS[cut.blocks]],
                "threshold": f"tau{n}",
                "default": getattr(config, f"tau{n}"),
                "tokens": "all tokens" if cut.joint else "image tokens",
                "window": max(1, tokens // getattr(config, f"pool{n}")),
            }
        )
    return rows


@figure_script
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    draw(facts(args), args.out / "method")
    return 0


if __name__ == "__main__":
    sys.exit(main())
