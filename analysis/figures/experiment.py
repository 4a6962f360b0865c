"""The table of an experiment, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from analysis.records.compare import as_table


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
    """The table of `rows`; a column that nobody could be measured in is left out and its reason given."""
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
