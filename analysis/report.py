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
import io
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment
from PIL import Image

from analysis import pareto, trace
from analysis.cli import figure_script, shipped
from analysis.measuring import parser_of
from analysis.options import positive
from analysis.records import store
from analysis.records.compare import groups, known
from analysis.records.provenance import source_of

SHIPPED = Path(shipped("assets/results/tiny_flux_report"))
PAGE = Path(__file__).with_name("report.html")
LEVELS = (  # tried in turn until the page is small enough: WebP options, longest side, what the page says
    ({"lossless": True, "method": 2}, None, "Pictures are as the folder has them."),
    ({"quality": 90}, None, "Pictures are compressed (WebP, quality 90)."),
    ({"quality": 75}, 512, "Pictures are compressed (WebP, quality 75) and at most 512 pixels wide."),
    ({"quality": 60}, 256, "Pictures are compressed (WebP, quality 60) and at most 256 pixels wide."),
    ({"quality": 40}, 128, "Pictures are compressed (WebP, quality 40) and at most 128 pixels wide."),
)
NAMES = {"psnr": "PSNR dB", "ssim": "SSIM", "gmsd": "GMSD", "words_read": "words", "clip_iqa": "CLIP-IQA"}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "report")
    parser.add_argument("--folder", type=Path, default=SHIPPED, help="--out of `analysis.experiment`")
    parser.add_argument(
        "--megabytes", type=positive, default=20.0, help="largest page (default: %(default)s)"
    )
    parser.add_argument("--methods", nargs="+", default=["h2cache", "block_cache", "teacache", "fewer_steps"])
    parser.set_defaults(prompts=None, **pareto.EXPERIMENT)
    return parser.parse_args(argv)


# Pictures.


def find_pictures(folder: Path) -> dict[str, Path]:
    """Key of a row to the file of its picture, wherever in `folder` it lies."""
    found = {}
    for pattern in ("images/*.*", "runs/*/images/*.*"):
        for path in sorted(folder.glob(pattern)):
            if path.suffix in (".png", ".webp", ".jpg"):
                found.setdefault(path.stem, path)
    return found


def encode(path: Path, options: dict, side: int | None) -> bytes:
    """The picture as WebP; one that is WebP already and small enough stays as it is."""
    with Image.open(path) as image:
        image.load()
        large = side is not None and max(image.size) > side
        if path.suffix == ".webp" and not large:
            return path.read_bytes()
        if large:
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.convert("RGB").save(file, "WEBP", **options)
    return file.getvalue()


def embed(paths: dict[str, Path], room: float) -> tuple[dict[str, str], str, list[str]]:
    """Data URIs by key that together take at most `room` bytes, how they are kept, and what is broken."""
    sizes = {}
    for number, (options, side, told) in enumerate(LEVELS):
        sample = [path for path in list(paths.values())[:: max(1, len(paths) // 8)] if _opens(path)]
        if sample and number + 1 < len(LEVELS):
            sizes = [len(encode(path, options, side)) for path in sample]
            if fmean(sizes) * len(paths) * 4 / 3 > 0.95 * room:  # base64 takes 4 bytes for 3
                continue
        found, broken = {}, []
        for key, path in paths.items():
            if not _opens(path):
                broken.append(f"{path}: the picture is broken")
                continue
            data = base64.b64encode(encode(path, options, side)).decode()
            found[key] = f"data:image/webp;base64,{data}"
        if sum(map(len, found.values())) <= room:
            return found, told if found else "", broken
    raise ValueError(f"{len(paths)} pictures do not fit into the page: give more --megabytes")


def _opens(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, ValueError, SyntaxError):
        return False
    return True


# Parts of the page.


def table(rows: list[dict]) -> tuple[list[str], list[list[tuple]]]:
    """The summary: headings, and a line for each contestant of values to sort by, each with its text."""
    by_metric = {m: {p["label"]: p for p in pareto.points(rows, m)} for m in NAMES}
    shown = [m for m in NAMES if any(p["method"] != "none" for p in by_metric[m].values())]
    base, lines = [r for r in rows if r["method"] == "none"], []
    for label, mine in groups(rows, "label").items():
        cost = pareto.points(mine if mine[0] in base else [*mine, *base], "ssim")[0]
        worst = min(known(mine, "psnr"), default=None)
        line = [(label, label), (len(mine), str(len(mine)))]
        line += [(cost["blocks_ratio"], f"{cost['blocks_ratio']:.2f}x fewer")]
        line += [(cost["speed_up"], f"{cost['speed_up']:.2f}x")]
        line += [_cell(by_metric[m].get(label), m) for m in shown]
        line += [(worst if worst is not None else 1e9, "-" if worst is None else f"{worst:.1f}")]
        lines.append([*line, (cost["mebibytes"], f"{cost['mebibytes']:.2f}")])
    heads = ["method", "prompts", "blocks", "time", *(NAMES[m] for m in shown), "worst PSNR", "cache MiB"]
    return heads, lines


def _cell(point: dict | None, metric: str) -> tuple[float, str]:
    """A value to sort by, and what is shown."""
    if point is None:
        return 1e9, "identical" if metric == "psnr" else "-"
    form, scale = {"psnr": (".1f", 1), "words_read": (".1f", 100)}.get(metric, (".4f", 1))
    low, high = point["low"] * scale, point["high"] * scale
    text = format(point["mean"] * scale, form) + (" %" if metric == "words_read" else "")
    if metric in pareto.ALONE:
        if point["method"] != "none":
            text += f" ({point['quality'] * scale:+{form}} [{low:+{form}}, {high:+{form}}])"
    elif point["method"] != "none":
        text += f" [{low:{form}}, {high:{form}}]"
    return point["mean"], text


def plots_of(rows: list[dict], source: Path, out: Path) -> list[tuple[str, str]]:
    """The figures that these rows allow: each PNG in base64, and its words."""
    parts = {}
    for metric in ("psnr", "words_read", "clip_iqa"):
        found = pareto.points(rows, metric)
        if any(p["method"] != "none" for p in found):
            pareto.draw(found, metric, pareto.published(), out / f"pareto_{metric}")
            parts[f"pareto_{metric}"] = f"{pareto.METRICS[metric][0]} against what it costs"
    if traced(rows):
        saved, label = trace.read(source, "h2cache", None)
        trace.draw_all(saved.rows, out / "trace_all")
        parts["trace_all"] = f"Measures and decisions at every step, {label}"
    read = {name: base64.b64encode((out / f"{name}.png").read_bytes()).decode() for name in parts}
    return [(read[name], words) for name, words in parts.items()]


def traced(rows: list[dict]) -> bool:
    """Whether they hold a trace of h2cache."""
    return any(row.get("trace") and row["method"] == "h2cache" for row in rows)


def told(row: dict) -> str:
    """The numbers under a picture."""
    parts = ["identical" if row["psnr"] is None else f"{row['psnr']:.1f} dB"]
    parts += [f"SSIM {row['ssim']:.4f}"] if row["ssim"] is not None else []
    parts += [f"words {row['words_read']:.0%}"] if row["words_read"] is not None else []
    return ", ".join([*parts, f"{row['blocks_run']} blocks", f"{row['seconds']:.2f} s"])


def page(rows: list[dict], images: dict[str, str], **parts: Any) -> str:
    """The whole page; `parts` go to the template as they are."""
    by_id: dict[str, dict[str, dict]] = {}
    for row in rows:
        short = {k: row[k] for k in ("key", "psnr", "words_read")} | {"told": told(row)}
        by_id.setdefault(row["id"], {})[row["label"]] = short
    uncached = [row for row in rows if row["method"] == "none"]
    base = uncached[0]["label"]
    cached = [label for label in groups(rows, "label") if label != base]
    pictured = {row["label"] for row in rows if row["key"] in images}
    heads, lines = table(rows)
    environment = Environment(autoescape=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment.from_string(PAGE.read_text(encoding="utf-8")).render(
        title=f"{len(uncached)} prompts, {len(cached)} cached contestants",
        heads=heads, table=lines, no_trace=not traced(rows), uncached=uncached, methods=cached,
        first=next((label for label in cached if label in pictured), cached[0]),
        data={"base": base, "rows": by_id, "images": images}, **parts,
    )  # fmt: skip


@figure_script
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    path, code = pareto.run(args) if args.run else (args.folder / "rows.jsonl", 0)
    folder = path.parent
    paths = [p for p in (folder / "rows.jsonl", folder / "rows.jsonl.gz") if p.is_file()]
    if not paths:
        raise FileNotFoundError(f"{folder} holds no rows.jsonl: give the --out of analysis.experiment")
    saved = pareto.read(paths[0])
    args.out.mkdir(parents=True, exist_ok=True)
    figures = plots_of(saved.rows, paths[0], args.out)
    found = find_pictures(folder)
    wanted = {row["key"]: found[row["key"]] for row in saved.rows if row["key"] in found}
    room = (
        args.megabytes * 2**20 - sum(map(len, (data for data, _ in figures))) - 2**20
    )  # a mebibyte for the rows and the page itself
    images, quality, broken = embed(wanted, room)
    saved.complaints += broken
    about = source_of(folder).replace("`", "")
    text = page(saved.rows, images, figures=figures, quality=quality, about=about, problems=saved.complaints)
    store.write_atomically(args.out / "report.html", text.encode())
    print(f"{args.out / 'report.html'}: {len(text) / 2**20:.1f} MiB, {len(images)} pictures")
    return max(code, saved.exit_code())


if __name__ == "__main__":
    sys.exit(main())
