"""A page of a run: pictures inside it, a table that sorts, and a slider for each prompt."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment
from PIL import Image

from analysis.records.compare import ALONE, groups, known, points

PAGE = Path(__file__).with_name("report.html")
LEVELS = (  # tried in turn until the page is small enough: WebP options, longest side, what the page says
    ({"lossless": True, "method": 2}, None, "Pictures are as the folder has them."),
    ({"quality": 90}, None, "Pictures are compressed (WebP, quality 90)."),
    ({"quality": 75}, 512, "Pictures are compressed (WebP, quality 75) and at most 512 pixels wide."),
    ({"quality": 60}, 256, "Pictures are compressed (WebP, quality 60) and at most 256 pixels wide."),
    ({"quality": 40}, 128, "Pictures are compressed (WebP, quality 40) and at most 128 pixels wide."),
)
NAMES = {"psnr": "PSNR dB", "ssim": "SSIM", "gmsd": "GMSD", "words_read": "words", "clip_iqa": "CLIP-IQA"}


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


def table(rows: list[dict]) -> tuple[list[str], list[list[tuple]]]:
    """The summary: headings, and a line for each contestant of values to sort by, each with its text."""
    by_metric = {m: {p["label"]: p for p in points(rows, m)} for m in NAMES}
    shown = [m for m in NAMES if any(p["method"] != "none" for p in by_metric[m].values())]
    base, lines = [r for r in rows if r["method"] == "none"], []
    for label, mine in groups(rows, "label").items():
        cost = points(mine if mine[0] in base else [*mine, *base], "ssim")[0]
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
    if metric in ALONE:
        if point["method"] != "none":
            text += f" ({point['quality'] * scale:+{form}} [{low:+{form}}, {high:+{form}}])"
    elif point["method"] != "none":
        text += f" [{low:{form}}, {high:{form}}]"
    return point["mean"], text


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
