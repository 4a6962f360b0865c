"""The experiment's rows as a table: means over prompts, bootstrap intervals paired with the baseline.

python -m analysis.table assets/results/experiment      # the table of a run, narrow, as in the README
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
from PIL import Image

from analysis.cli import guarded, shipped
from analysis.figures.sheets import grid
from analysis.options import Parser
from analysis.records import store
from analysis.records.compare import Interval, as_table, bootstrap, groups, known, mean, paired, times_fewer
from analysis.records.provenance import in_words
from analysis.records.saved import read_saved

PUBLISHED = Path(shipped("assets/published_results.jsonl"))
SHOWN = 4  # prompts from the start in compare.png, and as many of the worst


def lines(rows: list[dict]) -> list[dict[str, Any]]:
    """One line for each contestant, in the order of `rows`, compared with the baseline prompt by prompt.

    One that has no prompt in common with the finished pictures of the baseline has no line.
    """
    base = {row["id"]: row for row in rows if row["method"] == "none"}
    finished = groups([row for row in rows if row["id"] in base], "label")
    return [_line(label, mine, base) for label, mine in finished.items()]


def _line(label: str, mine: list[dict], base: dict[str, dict]) -> dict[str, Any]:
    uncached = [base[row["id"]] for row in mine]

    def difference(name: str) -> Interval | None:
        return paired(mine, uncached, name) if label != "none" else None

    seconds, psnr = known(mine, "seconds"), known(mine, "psnr")
    ratios = [b["seconds"] / row["seconds"] for row, b in zip(mine, uncached, strict=True)]
    return {
        "label": label,
        "method": mine[0]["method"],
        "config": mine[0]["config"],
        "prompts": len(mine),
        "blocks_ratio": times_fewer(mine, uncached),
        "blocks_run": mean(mine, "blocks_run"),
        "speed_up": median(ratios),
        "speed_up_interval": _ends(bootstrap(ratios, np.median)),
        "seconds_mean": fmean(seconds),
        "seconds_sd": stdev(seconds) if len(seconds) > 1 else None,
        "seconds_median": median(seconds),
        "seconds_steps": _median(known(mine, "seconds_steps")),
        "tflops": mean(mine, "tflops"),
        "psnr": mean(mine, "psnr"),
        "psnr_interval": _ends(bootstrap(psnr)) if psnr else None,
        "psnr_worst": min(psnr, default=None),
        "identical": sum(row["identical"] for row in mine),
        **{name: mean(mine, name) for name in ("ssim", "ms_ssim", "gmsd", "lpips", "words_read", "clip_iqa")},
        "words_difference": _difference(difference("words_read")),
        "clip_iqa_difference": _difference(difference("clip_iqa")),
        "peak_bytes": max((row["peak_bytes"] for row in mine if row["peak_bytes"]), default=None),
        "peak_kind": mine[0]["peak_kind"],
        "bytes_held": max(row["bytes_held"] for row in mine),
    }


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _ends(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def _difference(interval: Interval | None) -> dict | None:
    if interval is None:
        return None
    return {"mean": interval.mean, "interval": _ends(interval), "shown": interval.shows_difference}


# As text.


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)


def _compared(value: float | None, difference: dict | None, scale: float, form: str) -> str:
    """A mean, and its difference to the baseline with interval; one that may be chance is called so."""
    text = _number(value, form, scale)
    if difference is None:
        return text
    low, high = (format(end * scale, f"+{form}") for end in difference["interval"])
    verdict = "" if difference["shown"] else ", no difference shown"
    return f"{text} ({difference['mean'] * scale:+{form}} [{low}, {high}]{verdict})"


def _time(line: dict) -> str:
    if line["method"] == "none":
        return f"{line['speed_up']:.2f}x"
    return "{:.2f}x [{:.2f}, {:.2f}]".format(line["speed_up"], *line["speed_up_interval"])


COLUMNS = {  # heading: a line's cell
    "method": lambda x: x["label"],
    "blocks": lambda x: (
        f"{x['blocks_ratio']:.2f}x fewer" if x["label"] != "none" else f"{x['blocks_run']:.0f}"
    ),
    "time [95 %]": lambda x: _time(x),
    "s / image": lambda x: f"{x['seconds_median']:.3f}",
    "of that steps": lambda x: _number(x["seconds_steps"], ".3f"),
    "TFLOP": lambda x: _number(x["tflops"], ".4g"),
    "PSNR dB [95 %]": lambda x: (
        "identical" if x["psnr"] is None else "{:.1f} [{:.1f}, {:.1f}]".format(x["psnr"], *x["psnr_interval"])
    ),
    "identical": lambda x: str(x["identical"]) if x["identical"] and x["method"] != "none" else "-",
    "worst": lambda x: _number(x["psnr_worst"], ".1f"),
    "SSIM": lambda x: _number(x["ssim"], ".4f"),
    "MS-SSIM": lambda x: _number(x["ms_ssim"], ".4f"),
    "GMSD": lambda x: _number(x["gmsd"], ".4f"),
    "LPIPS": lambda x: _number(x["lpips"], ".4f"),
    "words read %": lambda x: _compared(x["words_read"], x["words_difference"], 100, ".1f"),
    "CLIP-IQA": lambda x: _compared(x["clip_iqa"], x["clip_iqa_difference"], 1, ".4f"),
    "cache MiB": lambda x: _number(x["bytes_held"], ".2f", 2**-20),
    "peak MiB": lambda x: _number(x["peak_bytes"], ".0f", 2**-20),
}


NARROW = {"method": COLUMNS["method"], "blocks": COLUMNS["blocks"]}
NARROW["time"] = lambda x: f"{x['speed_up']:.2f}x"
NARROW |= {head: COLUMNS[head] for head in ("s / image", "PSNR dB [95 %]", "worst", "SSIM", "words read %")}


def narrow(table: list[dict]) -> str:
    """The columns that fit a README."""
    return "\n".join(as_table(list(NARROW), [[cell(line) for cell in NARROW.values()] for line in table]))


def markdown(table: list[dict], rows: list[dict]) -> str:
    """The table of `rows`; a column that nobody could be measured in is left out and its reason told."""
    cells = {head: [cell(line) for line in table] for head, cell in COLUMNS.items()}
    shown = [head for head in cells if head == "method" or set(cells[head]) != {"-"}]
    parts = as_table(shown, zip(*(cells[head] for head in shown), strict=True))
    left_out = [head for head in cells if head not in shown]
    return "\n".join([*parts, "", *(f"- {reason}" for reason in _notes(table, left_out, rows)), ""])


def _notes(table: list[dict], left_out: list[str], rows: list[dict]) -> Iterator[str]:
    def reasons(name: str) -> list[str]:
        return sorted({row[name] for row in rows if row.get(name)})

    yield f"Over {table[0]['prompts']} prompts. Time is of the whole call: medians, and the median ratio."
    yield "PSNR to GMSD are against the uncached image; intervals are 95 % bootstrap over prompts, paired."
    if "identical" not in left_out:
        yield "`identical` counts pictures that equal the uncached one bit by bit; PSNR is of the others."
    yield "TFLOP is analytic: executed blocks times what one block costs."
    yield f"Peak memory is {table[0]['peak_kind']}, over the process; a cache's own share is in `cache MiB`."
    for line in table:
        if line["prompts"] < table[0]["prompts"]:
            yield f"{line['label']} is over {line['prompts']} prompts: the others have no finished picture."
    shown = {line["label"] for line in table}
    for label in dict.fromkeys(row["label"] for row in rows if row["label"] not in shown):
        yield f"{label} has no line: none of its prompts has a finished uncached picture."
    if "MS-SSIM" in left_out:
        yield "MS-SSIM is null: it needs sides above 175 pixels."
    if "LPIPS" in left_out:
        yield "LPIPS is null: the optional package `lpips` (with its AlexNet weights) is not there."
    if "words read %" in left_out:
        why = "; ".join(reasons("words_reason")) or "the prompts name none, or --no-words."
        yield f"No words were read: {why}"
    for reason in reasons("clip_iqa_reason"):
        yield f"CLIP-IQA is null: {reason}"


def published(path: Path = PUBLISHED) -> list[dict]:
    """What the papers and repositories printed."""
    return read_saved([path], {"method": str, "source": str}).rows


def published_markdown(rows: list[dict]) -> str:
    heads = ("model", "data", "method", "setting", "steps", "seconds", "speed_up", "clip_iqa", "hardware")
    heads = (*heads, "source")
    about = "1024x1024, except where no steps stand: there the source states no size either"
    parts = as_table(heads, [[row[head] for head in heads] for row in rows])
    return "\n".join([f"**Published by others, not measured here** ({about}):", "", *parts, ""])


# As files.


def write_tables(out: Path, images: Path, rows: list[dict], settings: dict, command: str) -> str:
    """Write table.md, .csv, .json, rows.jsonl and compare.png into `out`; returns the text of our rows."""
    table = lines(rows)
    if not table:
        raise ValueError("there is no finished uncached picture to make a table of")
    head = {
        "command": command,
        "machine": rows[-1]["machine"],
        "date": max(row["date"] for row in rows),
        "settings": settings,
    }
    ours = markdown(table, rows)
    text = "\n".join([in_words(head), "", ours, published_markdown(published())])
    store.write_atomically(out / "table.md", text.encode())
    everything = head | {"rows": table, "published": published()}
    store.write_atomically(out / "table.json", (json.dumps(everything, indent=1) + "\n").encode())
    store.write_atomically(out / "table.csv", _csv(table).encode())
    told = {*settings, "machine", "how", "clip_iqa_reason", "words_reason"} - {"seed"}  # in table.json, once
    short = [{name: value for name, value in row.items() if name not in told} for row in rows]
    store.write_records(out / "rows.jsonl", {row["label"] + row["key"]: row for row in short})
    told = {line["label"] for line in table}
    store.save_png(out / "compare.png", compare([r for r in rows if r["label"] in told], images))
    return ours


def _csv(table: list[dict]) -> str:
    flat = [{k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in x.items()} for x in table]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]))
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def compare(rows: list[dict], images: Path) -> Image.Image:
    """Prompts in rows, contestants in columns: the first prompts, then those with the lowest PSNR of all."""
    by_id: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_id.setdefault(row["id"], {})[row["label"]] = row
    labels = list(dict.fromkeys(row["label"] for row in rows))
    whole = [identity for identity, found in by_id.items() if len(found) == len(labels)]

    def lowest(identity: str) -> float:
        return min(
            (r["psnr"] for r in by_id[identity].values() if r["psnr"] is not None), default=float("inf")
        )

    chosen = dict.fromkeys([*whole[:SHOWN], *sorted(whole, key=lowest)[:SHOWN]])
    pictures, captions = [], []
    for identity in chosen:
        found = [by_id[identity][label] for label in labels]
        pictures.append([Image.open(images / f"{row['key']}.png").convert("RGB") for row in found])
        captions.append([identity if n == 0 else _caption(row) for n, row in enumerate(found)])
    return grid(pictures, labels, captions)


def _caption(row: dict) -> str:
    return "identical" if row["psnr"] is None else f"{row['psnr']:.1f} dB, {row['seconds']:.2f} s"


def show(folder: Path) -> None:
    path = folder / "table.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: give the --out of `python -m analysis.experiment`")
    report = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(report, dict) or "rows" not in report:
        raise ValueError(f"{path} is no table of the experiment")
    print(narrow(report["rows"]))


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="--out of the experiment")
    args = parser.parse_args(argv)
    return guarded(lambda: show(args.folder), "")


if __name__ == "__main__":
    sys.exit(main())
