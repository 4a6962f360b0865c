"""The experiment's rows as a table: means over prompts, bootstrap intervals paired with the baseline.

python -m analysis.table assets/results/experiment      # the table of a run, narrow, as in the README
"""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

from analysis.cli import guarded
from analysis.figures.experiment import markdown, narrow
from analysis.figures.sheets import compare
from analysis.options import Parser
from analysis.records import store
from analysis.records.compare import lines
from analysis.records.provenance import in_words
from analysis.records.published import published, published_markdown

# As text.


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
