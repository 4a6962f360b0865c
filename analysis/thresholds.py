"""How far may structure and detail be reused? The plane of tau1 and tau2, measured, with the best pairs.

    python -m analysis.thresholds                                        # from the shipped records
    python -m analysis.thresholds --records FOLDER                       # of `python -m analysis.calibrate`
    python -m analysis.thresholds --run --tau1 0.1 0.2 0.3 --tau2 0.05 0.1 0.2 --limit 8
    python -m analysis.thresholds --run --model black-forest-labs/FLUX.1-dev --prompts my.jsonl --clip DIR

Heat maps of the speed-up in blocks and in seconds, of PSNR, and of words read and CLIP-IQA where they were
measured; on them the pairs that no other beats in both blocks and PSNR, the model's presets and the paper's.

Writes thresholds.png/.pdf/.csv and the answer in thresholds.md.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from analysis import calibrate, options
from analysis.cli import figure_script, shipped
from analysis.figures import style
from analysis.figures.thresholds import answer, draw
from analysis.measuring import parser_of, recorded
from analysis.records.provenance import source_of
from analysis.records.saved import MAYBE, NUMBER, Saved, read_saved
from h2cache import H2Config
from h2cache.presets import PRESETS

SHIPPED = Path(shipped("assets/results/tiny_flux_grid"))
TAU1 = (0.06, 0.12, 0.15, 0.2, 0.3, 0.35, 0.5, 0.6)  # with the presets' and the paper's values
TAU2 = (0.02, 0.05, 0.1, 0.15, 0.2, 0.22, 0.3, 0.6)
NEEDS = {
    "key": str, "id": str, "method": str, "config": dict, "seconds": NUMBER, "seconds_uncached": NUMBER,
    "blocks_run": int, "blocks": int, "psnr": MAYBE, "ssim": NUMBER, "words": MAYBE,
}  # fmt: skip


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "thresholds")
    parser.add_argument("--records", type=Path, default=SHIPPED, help="folder of records-*.jsonl[.gz]")
    parser.add_argument("--tau1", type=options.number, nargs="+", default=TAU1)
    parser.add_argument("--tau2", type=options.number, nargs="+", default=TAU2)
    parser.add_argument("--clip", help="CLIP for CLIP-IQA: folder or hub id")
    parser.set_defaults(pairs=None, set=[], words=True, shard=(0, 1))
    return parser.parse_args(argv)


@recorded("thresholds")
def run(args: argparse.Namespace) -> Path:
    """Measure the grid as `analysis.calibrate` does, words read back."""
    calibrate.run(args, "thresholds")
    return args.out


def read(folder: Path) -> Saved:
    """Rows of a calibration whose uncached picture is there too."""
    paths = sorted([*folder.glob("records-*.jsonl"), *folder.glob("records-*.jsonl.gz")])
    saved = read_saved(paths, NEEDS, same={"blocks": lambda row: row["blocks"]}, unique=("key",))
    base = saved.keep_with_uncached(folder)
    unread = Counter(r["id"] for r in saved.rows if (r["words"] is None) != (base[r["id"]]["words"] is None))
    for name, count in unread.items():
        saved.complaints.append(f"{folder}: {count} pictures of {name}, whose words were read in another way "
                                "than those of the uncached one")  # fmt: skip
    usual = asdict(H2Config())
    saved.rows = [
        r for r in saved.rows
        if (r["words"] is None) == (base[r["id"]]["words"] is None)
        and (r["method"] == "none" or _is_plain(r["config"], usual))
    ]  # fmt: skip
    if not any(r["method"] == "h2cache" for r in saved.rows):
        saved.exit_code()
        raise ValueError(f"{folder} holds no picture of H2-Cache with its uncached one")
    return saved


def _is_plain(config: dict, usual: dict) -> bool:
    """Whether only the two thresholds differ from the defaults, both finite."""
    others = {k: v for k, v in usual.items() if k not in ("tau1", "tau2")}
    finite = all(isinstance(config.get(k), NUMBER) for k in ("tau1", "tau2"))
    return finite and all(config.get(k, v) == v for k, v in others.items())


@figure_script
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    folder = run(args) if args.run else args.records
    saved = read(folder)
    model = Path(args.model).name
    presets = {
        (p.settings["tau1"], p.settings["tau2"]): name
        for name, p in PRESETS.items()
        if p.model == model and p.method == "h2cache" and len(p.settings) == 2
    }
    lines = calibrate.table(saved.rows)
    draw(lines, presets, args.out / "thresholds")
    style.write_words(args.out / "thresholds.md", answer(lines, saved.rows, presets, source_of(folder)))
    return saved.exit_code()


if __name__ == "__main__":
    sys.exit(main())
