"""One HTML page of a run, without server or network: table, plots, and every prompt with a slider.

    python -m analysis.report                                # of the shipped records
    python -m analysis.report --folder outputs/experiment    # of a run of `python -m analysis.experiment`
    python -m analysis.report --run --limit 12 --methods h2cache block_cache

The slider goes from the uncached to the cached picture; prompts can be put in order of lowest PSNR or of
fewest words read. Pictures are kept without loss where the page stays under --megabytes, else
compressed, else made smaller; the page says which.

Writes report.html, and the figures in it as in `analysis.pareto` and `analysis.trace`.
"""

from __future__ import annotations

import argparse
import base64
import sys
from pathlib import Path

from analysis import pareto
from analysis.cli import figure_script, shipped
from analysis.figures.page import embed, find_pictures, page, traced
from analysis.figures.pareto import draw
from analysis.figures.trace import draw_all
from analysis.measuring import parser_of
from analysis.options import positive
from analysis.records import store, traces
from analysis.records.compare import METRICS, points
from analysis.records.provenance import source_of
from analysis.records.published import published
from analysis.records.saved import find_records

SHIPPED = Path(shipped("assets/results/tiny_flux_report"))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "report")
    parser.add_argument("--folder", type=Path, default=SHIPPED, help="--out of `analysis.experiment`")
    parser.add_argument(
        "--megabytes", type=positive, default=20.0, help="largest page (default: %(default)s)"
    )
    parser.add_argument("--methods", nargs="+", default=["h2cache", "block_cache", "teacache", "fewer_steps"])
    parser.set_defaults(prompts=None, **pareto.EXPERIMENT)
    return parser.parse_args(argv)


def plots_of(rows: list[dict], source: Path, out: Path) -> list[tuple[str, str]]:
    """The figures that these rows allow: each PNG in base64, and its words."""
    parts = {}
    for metric in ("psnr", "words_read", "clip_iqa"):
        found = points(rows, metric)
        if any(p["method"] != "none" for p in found):
            draw(found, metric, published(), out / f"pareto_{metric}")
            parts[f"pareto_{metric}"] = f"{METRICS[metric][0]} against what it costs"
    if traced(rows):
        saved, label = traces.read(source, "h2cache", None)
        draw_all(saved.rows, out / "trace_all")
        parts["trace_all"] = f"Measures and decisions at every step, {label}"
    read = {name: base64.b64encode((out / f"{name}.png").read_bytes()).decode() for name in parts}
    return [(read[name], words) for name, words in parts.items()]


@figure_script
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    folder, code = (args.out, pareto.run(args)[1]) if args.run else (args.folder, 0)
    path = find_records(folder, "rows")
    saved = pareto.read(path)
    args.out.mkdir(parents=True, exist_ok=True)
    figures = plots_of(saved.rows, path, args.out)
    found = find_pictures(folder)
    wanted = {row["key"]: found[row["key"]] for row in saved.rows if row["key"] in found}
    plots = sum(len(data) for data, _ in figures)
    room = args.megabytes * 2**20 - plots - 2**20  # a mebibyte for the rows and the page itself
    images, quality, broken = embed(wanted, room)
    saved.complaints += broken
    about = source_of(folder).replace("`", "")
    text = page(saved.rows, images, figures=figures, quality=quality, about=about, problems=saved.complaints)
    store.write_atomically(args.out / "report.html", text.encode())
    print(f"{args.out / 'report.html'}: {len(text) / 2**20:.1f} MiB, {len(images)} pictures")
    return max(code, saved.exit_code())


if __name__ == "__main__":
    sys.exit(main())
